//! How much memory this process has taken.

/// The most memory that this process has had at once, resident, in bytes; `None` where the system does not say.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    peak_of(&status)
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_from_the_line_of_that_name() {
        let status = "Name:\tfinetune\nVmPeak:\t  999 kB\nVmHWM:\t  123456 kB\nVmRSS:\t  100 kB\n";
        assert_eq!(peak_of(status), Some(123_456 * 1024));
        assert_eq!(peak_of("Name:\tfinetune\n"), None);
        #[cfg(target_os = "linux")]
        assert!(peak_memory().unwrap() > 1 << 20);
    }
}
