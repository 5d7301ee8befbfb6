//! Fill of the kernel's conntrack table. When it is full, the kernel drops new connections, also
//! those of Towline.

/// Number of entries in the conntrack table, and its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conntrack {
    /// Number of connections.
    pub count: u64,
    /// Greatest number of connections.
    pub max: u64,
}

impl Conntrack {
    /// Reads the fill of this network namespace. Returns `None` if the kernel tracks no connections.
    pub fn read() -> Option<Self> {
        let read = |name: &str| -> Option<u64> {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Some(Self { count: read("count")?, max: read("max")? })
    }

    /// Returns true if at most 5 % of the table are free. The last 5 % are used up within moments.
    pub fn is_full(self) -> bool {
        self.max > 0 && self.count >= self.max - self.max / 20
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_full_before_the_last_entries_are_used() {
        let is_full = |count, max| Conntrack { count, max }.is_full();
        assert!(!is_full(900, 1_000));
        assert!(!is_full(0, 0));
        assert!(is_full(960, 1_000));
    }
}
