//! Several processes that do one job: a part of a list for each, or one training together.

use std::str::FromStr;

use anyhow::Result;
use cxr::device::{Adapter, DeviceSpec};
use cxr::trainer::distributed::{Alone, Ranks};

/// Which part of a list one of several processes works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub index: usize,
    /// How many parts there are.
    pub count: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, count)) if index < count => Ok(Self { index, count }),
            _ => Err("expected a part and how many there are, e.g. 0/4, 1/4, 2/4, 3/4".to_owned()),
        }
    }
}

impl Shard {
    /// Whether the item at a place of the list is this part's. Neighbours go to different parts.
    pub fn has(self, place: usize) -> bool {
        place % self.count == self.index
    }

    /// This process's part by what started it: `mpirun`, a step of Slurm's `srun`, an array of Slurm jobs, or an array of
    /// those; `None` for one process.
    pub fn of_environment() -> Option<Self> {
        Self::of_variables(|name| std::env::var(name).ok()?.trim().parse().ok())
    }

    fn of_variables(number: impl Fn(&str) -> Option<usize>) -> Option<Self> {
        let part = |index: &str, count: &str| {
            let (index, count) = (number(index)?, number(count)?);
            (index < count).then_some(Self { index, count })
        };
        // SLURM_NTASKS is set in a batch script as well, where there is one process whatever it says.
        let process = part("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
            .or_else(|| part("PMI_RANK", "PMI_SIZE"))
            .or_else(|| part("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
            .unwrap_or(Self { index: 0, count: 1 });
        let array = number("SLURM_ARRAY_TASK_COUNT").and_then(|count| {
            let step = number("SLURM_ARRAY_TASK_STEP").unwrap_or(1).max(1);
            let first = number("SLURM_ARRAY_TASK_MIN").unwrap_or(0);
            let index = number("SLURM_ARRAY_TASK_ID")?.checked_sub(first)? / step;
            (index < count).then_some(Self { index, count })
        });
        let Self { index, count } = array.unwrap_or(Self { index: 0, count: 1 });
        let whole = Self { index: index * process.count + process.index, count: count * process.count };
        (whole.count > 1).then_some(whole)
    }
}

/// The device of one of several processes that a launcher started: where the command line has no number, or 0, those on a
/// machine take its devices in turn.
pub fn device_of_rank(device: DeviceSpec) -> DeviceSpec {
    match device {
        DeviceSpec::Cuda(1..) | DeviceSpec::Wgpu(Adapter::Discrete(1..)) | DeviceSpec::Tch(Some(1..)) => {
            device
        }
        _ => device.for_rank(local_rank()),
    }
}

/// Which of the processes on this machine this is, by what started it; 0 where nothing says so. A batch script of Slurm,
/// which is one process, has the variables of a step but no step.
fn local_rank() -> usize {
    local_rank_of(|name| std::env::var(name).ok()?.trim().parse().ok())
}

fn local_rank_of(number: impl Fn(&str) -> Option<usize>) -> usize {
    let of_step = || number("SLURM_STEP_NUM_TASKS").and_then(|_| number("SLURM_LOCALID"));
    number("OMPI_COMM_WORLD_LOCAL_RANK").or_else(|| number("MPI_LOCALRANKID")).or_else(of_step).unwrap_or(0)
}

/// The processes of a training.
pub struct Processes {
    #[cfg(feature = "mpi")]
    mpi: Option<cxr::trainer::distributed::Mpi>,
}

/// How many processes `mpirun` or `srun` say that they have started, this one among them; `None` without either.
fn launched() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.trim().parse::<usize>().ok();
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"]
        .into_iter()
        .find_map(number)
}

impl Processes {
    /// Joins those that were started together; a process that was started by itself does without MPI.
    ///
    /// # Errors
    /// If there are several, and this binary was not built for that.
    pub fn start() -> Result<Self> {
        #[cfg(feature = "mpi")]
        {
            let launched = launched().is_some() || std::env::var_os("PMIX_RANK").is_some();
            let mpi = launched.then(cxr::trainer::distributed::Mpi::start).transpose()?;
            Ok(Self { mpi })
        }
        #[cfg(not(feature = "mpi"))]
        {
            if let Some(count) = launched().filter(|count| *count > 1) {
                anyhow::bail!(
                    "started as one of {count} processes, which would all do the same: build with --features mpi to \
                     have them train together"
                );
            }
            Ok(Self {})
        }
    }

    /// As the trainer wants them.
    pub fn ranks(&self) -> &dyn Ranks {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            return mpi;
        }
        &Alone
    }

    /// Which of the processes on this machine this is.
    pub fn local_rank(&self) -> usize {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            return mpi.local_rank();
        }
        0
    }

    /// Ends all processes because this one failed; nothing where it is alone.
    pub fn end_all(&self) {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = self.mpi.as_ref().filter(|mpi| mpi.size() > 1) {
            mpi.abort(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_on_a_machine_is_read_from_the_launcher() {
        let rank = |set: &[(&str, usize)]| {
            local_rank_of(|name| set.iter().find(|(other, _)| *other == name).map(|(_, n)| *n))
        };
        assert_eq!(rank(&[]), 0);
        assert_eq!(rank(&[("OMPI_COMM_WORLD_LOCAL_RANK", 3), ("OMPI_COMM_WORLD_RANK", 11)]), 3);
        assert_eq!(rank(&[("MPI_LOCALRANKID", 2)]), 2);
        assert_eq!(rank(&[("SLURM_LOCALID", 1), ("SLURM_STEP_NUM_TASKS", 8)]), 1);
        assert_eq!(rank(&[("SLURM_LOCALID", 1)]), 0);
    }

    #[test]
    fn parts_are_read_from_text() {
        assert_eq!("2/8".parse(), Ok(Shard { index: 2, count: 8 }));
        for text in ["", "2", "8/8", "-1/2", "1/0", "a/b"] {
            assert!(text.parse::<Shard>().unwrap_err().contains("0/4"), "{text}");
        }
        let shard = Shard { index: 1, count: 3 };
        assert_eq!((0..8).filter(|place| shard.has(*place)).collect::<Vec<_>>(), [1, 4, 7]);
    }

    #[test]
    fn what_started_the_process_says_which_part_is_its() {
        let of = |variables: &[(&str, usize)]| {
            Shard::of_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| *value))
        };
        let shard = |index, count| Some(Shard { index, count });
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", 1), ("OMPI_COMM_WORLD_SIZE", 4)]), shard(1, 4));
        assert_eq!(of(&[("SLURM_PROCID", 3), ("SLURM_STEP_NUM_TASKS", 8)]), shard(3, 8));
        assert_eq!(of(&[("SLURM_PROCID", 0), ("SLURM_NTASKS", 8)]), None, "a batch script is one process");
        let array =
            [("SLURM_ARRAY_TASK_ID", 14), ("SLURM_ARRAY_TASK_MIN", 10), ("SLURM_ARRAY_TASK_COUNT", 3)];
        let step = [("SLURM_ARRAY_TASK_STEP", 2)];
        assert_eq!(of(&[&array[..], &step].concat()), shard(2, 3));
        let processes = [("SLURM_PROCID", 1), ("SLURM_STEP_NUM_TASKS", 2)];
        assert_eq!(of(&[&array[..], &step, &processes].concat()), shard(5, 6));
    }
}
