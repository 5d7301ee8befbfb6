//! Description of the machine on which figures were measured.

use std::fmt::{self, Display, Formatter};

use anyhow::Context;
use serde::Serialize;

/// This machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Hardware {
    /// Model of the processor, as the kernel names it; empty if it does not.
    pub processor: String,
    /// Number of processors that the lab may use.
    pub cores: usize,
    /// Memory in gigabytes (10^9 bytes).
    pub memory_gb: u64,
    /// Release of the kernel, as in `uname -r`.
    pub kernel: String,
}

impl Hardware {
    /// Reads the description of this machine.
    pub(super) fn read() -> anyhow::Result<Self> {
        let read = |path: &str| {
            std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
        };
        Ok(Self {
            processor: value(&read("/proc/cpuinfo")?, "model name").unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            memory_gb: gigabytes(&read("/proc/meminfo")?).unwrap_or_default(),
            kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        })
    }
}

/// Returns the value of the first line `KEY: VALUE`.
fn value(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Returns the memory of the machine from the text of `/proc/meminfo`, in gigabytes.
fn gigabytes(text: &str) -> Option<u64> {
    let kilobytes: u64 = value(text, "MemTotal")?.strip_suffix("kB")?.trim().parse().ok()?;
    Some((kilobytes * 1024 + 500_000_000) / 1_000_000_000)
}

impl Display for Hardware {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, memory_gb, kernel } = self;
        if !processor.is_empty() {
            write!(f, "{processor}, ")?;
        }
        write!(f, "{cores} cores, {memory_gb} GB of memory, Linux {kernel}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_describes_the_machine() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Fast CPU\nmodel name\t: Fast CPU\n";
        assert_eq!(value(cpuinfo, "model name").as_deref(), Some("Fast CPU"));
        assert_eq!(value("processor : 0\n", "model name"), None);
        assert_eq!(gigabytes("MemTotal:       24601560 kB\nMemFree: 1 kB\n"), Some(25));
        assert_eq!(gigabytes("MemTotal: many\n"), None);
        let machine = Hardware {
            processor: String::new(),
            cores: 2,
            memory_gb: 25,
            kernel: "7.3".to_owned(),
        };
        assert_eq!(machine.to_string(), "2 cores, 25 GB of memory, Linux 7.3");
    }
}
