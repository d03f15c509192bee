use image::{Rgb, RgbImage, imageops};

/// Sets pictures side by side, row by row, with a grey line of 2 pixels between and around them; each cell has the
/// size of the largest picture. No picture gives a single grey pixel.
///
/// # Panics
/// When `columns` is 0.
pub fn contact_sheet(images: &[RgbImage], columns: usize) -> RgbImage {
    const LINE: u32 = 2;
    const GREY: Rgb<u8> = Rgb([96; 3]);
    assert!(columns > 0, "a contact sheet needs at least one column, got 0");
    let Some(cell_width) = images.iter().map(RgbImage::width).max() else {
        return RgbImage::from_pixel(1, 1, GREY);
    };
    let cell_height = images.iter().map(RgbImage::height).max().unwrap_or(0);
    let columns = columns.min(images.len());
    let rows = images.len().div_ceil(columns);
    let width = columns as u32 * (cell_width + LINE) + LINE;
    let height = rows as u32 * (cell_height + LINE) + LINE;
    let mut sheet = RgbImage::from_pixel(width, height, GREY);
    for (i, image) in images.iter().enumerate() {
        let x = (i % columns) as u32 * (cell_width + LINE) + LINE;
        let y = (i / columns) as u32 * (cell_height + LINE) + LINE;
        imageops::replace(&mut sheet, image, x.into(), y.into());
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_stand_row_by_row() {
        let images: Vec<_> = (0..5_u8).map(|i| RgbImage::from_pixel(4, 3, Rgb([i; 3]))).collect();
        let sheet = contact_sheet(&images, 2);
        assert_eq!(sheet.dimensions(), (2 * 6 + 2, 3 * 5 + 2));
        for i in 0..5_u32 {
            assert_eq!(sheet.get_pixel(2 + i % 2 * 6, 2 + i / 2 * 5).0, [i as u8; 3]);
        }
        assert_eq!(sheet.get_pixel(8, 12).0, [96; 3], "the sixth cell is empty");
        assert_eq!(sheet.get_pixel(0, 0).0, [96; 3]);
        assert_eq!(contact_sheet(&[], 3).dimensions(), (1, 1));
        assert_eq!(contact_sheet(&images[..1], 9).dimensions(), (8, 7));
    }

    #[test]
    #[should_panic(expected = "at least one column")]
    fn no_columns_is_a_mistake() {
        contact_sheet(&[], 0);
    }
}
