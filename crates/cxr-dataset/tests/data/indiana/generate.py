"""Writes the two tables of this folder: the layout of the Indiana University collection's Kaggle edition with invented
texts. 60 reports, 118 images. Run `python3 generate.py` here; the output is the same every time.

Reports 7 and 23 have no impression, report 41 blanks alone (2 images each): 6 empty.
Reports 12 and 50 have impressions of more than 77 tokens (2 and 1 images): 3 too long.
Reports 5 and 30 hold XXXX. Report 50 and 60 have one image, the others two.
"""

import csv

NORMAL = ["No acute cardiopulmonary abnormality.", "No active disease.", "Clear lungs.", "1. No acute findings."]
PROBLEMS = [
    ("Cardiomegaly", "Cardiomegaly/mild", "Mild cardiomegaly.  No edema."),
    ("Pulmonary Atelectasis;Pleural Effusion", "Pulmonary Atelectasis/base;Pleural Effusion/left", "Atelectasis, and\nan effusion."),
    ("Opacity;Opacity", "Opacity/lung/apex/left;Opacity/lung/base/right", 'Opacities, "patchy".'),
]
LONG = " ".join(f"Finding {i} is described at length, without an end." for i in range(12))

with open("indiana_reports.csv", "w", newline="") as reports, open("indiana_projections.csv", "w", newline="") as projections:
    reports, projections = csv.writer(reports, lineterminator="\n"), csv.writer(projections, lineterminator="\n")
    reports.writerow(["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"])
    projections.writerow(["uid", "filename", "projection"])
    for uid in range(1, 61):
        problems, mesh, impression = PROBLEMS[uid % 3] if uid % 2 else ("normal", "normal", NORMAL[uid % 4])
        if uid in (7, 23):
            impression = ""
        if uid == 41:
            impression = "  \n "
        if uid in (12, 50):
            impression = LONG
        if uid in (5, 30):
            impression = "Normal chest x-XXXX. " + impression
        reports.writerow([uid, mesh, problems, "Chest, 2 views", "Cough", "None.", "As described.", impression])
        projections.writerow([uid, f"{uid}_IM-0001-1001.dcm.png", "Frontal"])
        if uid not in (50, 60):
            projections.writerow([uid, f"{uid}_IM-0001-2001.dcm.png", "Lateral"])
