//! Ranks under MPI: `mpirun -n 8 program ...`, `srun program ...`.

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

use super::Ranks;
use crate::TrainError;

/// The processes that `mpirun` or `srun` started. Without either it is one process.
///
/// Made once, at the start of a program, and kept to its end, on the thread that trains. When it is dropped in a panic,
/// the other processes are ended: they would wait for this one for ever.
pub struct Mpi {
    world: SimpleCommunicator,
    local_rank: usize,
    // dropped last: ends MPI
    _universe: Universe,
}

impl Mpi {
    /// Joins the other processes.
    ///
    /// # Errors
    /// [`TrainError::Ranks`] if MPI was started before in this process.
    pub fn start() -> Result<Self, TrainError> {
        // The kernels have threads, which never call MPI.
        let started = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, _) = started.ok_or_else(|| TrainError::Ranks {
            problem: "MPI was started before in this process".to_owned(),
        })?;
        let world = universe.world();
        let local_rank = world.split_shared(world.rank()).rank() as usize;
        Ok(Self { world, local_rank, _universe: universe })
    }

    /// Which of the processes on this machine this is, from 0: the number of its device.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Ends all processes, after this one has said why.
    pub fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(101);
        }
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), TrainError> {
        let own = values.to_vec();
        // MPI's own errors end all processes, with a message.
        self.world.all_reduce_into(&own[..], values, SystemOperation::sum());
        Ok(())
    }

    fn wait(&self) {
        self.world.barrier();
    }
}
