//! Counters of what was refused or held back, for metrics: misbehaviour of others is a counter, not
//! an error.

/// Counts since the start of the agent. Each only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Signals that were replayed, overtaken, too many, or of an unknown peer.
    pub signals_refused: u64,
    /// Candidates that were left out: inside the mesh's prefixes, our own, or too many.
    pub candidates_refused: u64,
    /// Datagrams that were not sent to an address that never answers.
    pub probes_withheld: u64,
    /// Pings that were not handled, because the peer sent too many.
    pub pings_refused: u64,
    /// Answers of a relay that nothing asked for, or too many, or of a node that is none.
    pub relay_answers_refused: u64,
    /// Requests to this node's relay that were over a limit, or for a node that is not registered.
    pub relay_requests_refused: u64,
    /// Answers of a reflector that nothing asked for, or that named an impossible address.
    pub stun_refused: u64,
}

impl Counters {
    /// Returns each count with the name that operators see.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("signals_refused", self.signals_refused),
            ("candidates_refused", self.candidates_refused),
            ("probes_withheld", self.probes_withheld),
            ("pings_refused", self.pings_refused),
            ("relay_answers_refused", self.relay_answers_refused),
            ("relay_requests_refused", self.relay_requests_refused),
            ("stun_refused", self.stun_refused),
        ]
    }
}
