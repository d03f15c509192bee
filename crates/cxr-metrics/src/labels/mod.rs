//! What is known of the pictures of a folder: prompt, patient, view and findings, from the table beside them.

mod mention;
mod read;
mod record;
mod vocabulary;

pub use mention::{Mention, mention};
pub use read::{TABLES, read_records, records_of};
pub use record::{ImageRecord, ViewGroup};
pub use vocabulary::same_finding;
