//! Section `[wireguard]`: the UDP side of the tunnels.

use serde::{Deserialize, Serialize};
use towline_dataplane::{Aead, EngineChoice};

use super::SealAhead;

/// Settings of the UDP side of the tunnels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WireguardConfig {
    /// UDP port, 1 to 65535.
    pub port: u16,
    /// Number of threads that move packets, 1 to 16. One is enough for a few Gb/s. With several,
    /// the peers are distributed over them.
    pub workers: usize,
    /// True if outer packets get the DSCP of the inner ones. It tells everybody on the way which
    /// traffic is which.
    pub copy_dscp: bool,
    /// Implementation of WireGuard's handshake and sessions. Peers with different ones understand each
    /// other.
    pub engine: WireguardEngine,
    /// Implementation of the cipher that the engine `batch` uses.
    pub aead: WireguardAead,
    /// Longest time in microseconds for which a worker that moves packets looks for more of them before
    /// it sleeps, 0 to 1,000. It shortens latency where waking up a halted processor is slow, and lengthens
    /// it where all processors are in use. 0: it sleeps at once.
    pub spin_us: u32,
    /// Number of threads that encrypt large batches while the worker goes on: `"auto"`, `"off"` or 1 to 8.
    /// They are for more throughput with one peer, on a machine with idle cores, and work with the engine
    /// `batch` and one worker only. `auto` starts one for each four cores, at most two, and none below four
    /// cores or with several workers.
    pub seal_ahead: SealAhead,
    /// True if `wg show` is answered, at `/run/wireguard/LINK.sock`.
    pub uapi: bool,
}

impl Default for WireguardConfig {
    fn default() -> Self {
        Self {
            port: 51830,
            workers: 1,
            copy_dscp: false,
            engine: WireguardEngine::Auto,
            aead: WireguardAead::Auto,
            spin_us: 0,
            seal_ahead: SealAhead::Auto,
            uapi: true,
        }
    }
}

/// Implementation of WireGuard's handshake and sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardEngine {
    /// `batch` on a CPU with a fast cipher for batches (AVX2 or AVX-512) that passes its test at start,
    /// `boringtun` on any other.
    #[default]
    Auto,
    /// Towline's own: packets are encrypted and decrypted in batches, in place.
    Batch,
    /// The library boringtun: one packet at a time.
    Boringtun,
}

impl From<WireguardEngine> for EngineChoice {
    fn from(engine: WireguardEngine) -> Self {
        match engine {
            WireguardEngine::Auto => Self::Auto,
            WireguardEngine::Batch => Self::Batch,
            WireguardEngine::Boringtun => Self::Boringtun,
        }
    }
}

/// Implementation of ChaCha20-Poly1305.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardAead {
    /// The fastest that this CPU has and that passes its test at start.
    #[default]
    Auto,
    /// The library ring: one packet at a time.
    Ring,
}

impl From<WireguardAead> for Aead {
    fn from(aead: WireguardAead) -> Self {
        match aead {
            WireguardAead::Auto => Self::Auto,
            WireguardAead::Ring => Self::Ring,
        }
    }
}
