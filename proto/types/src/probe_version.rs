//! Version of the probes of a node.

/// Version of a node's probes. The node's signed record has it; see
/// [`Record::probe_version`](crate::node::Record::probe_version).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ProbeVersion {
    /// Probes without replay protection, of agents before version 2.
    #[default]
    V1,
    /// Probes with a stamp, which protects them against replays.
    V2,
}

impl ProbeVersion {
    /// Version of this program's probes.
    pub const OWN: Self = Self::V2;

    /// Returns the version that a record names. A node that has a later one has version 2 too.
    /// Agents before version 2 name none, which is 0.
    pub fn of_record(number: u32) -> Self {
        if number < 2 { Self::V1 } else { Self::V2 }
    }

    /// Returns the number for a record. 0 stands for version 1.
    pub fn record_number(self) -> u32 {
        match self {
            Self::V1 => 0,
            Self::V2 => 2,
        }
    }

    /// Returns the byte in the header of a probe.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }
}
