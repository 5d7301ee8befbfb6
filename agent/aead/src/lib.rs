//! ChaCha20-Poly1305 (RFC 8439) for batches of packets, in place, as WireGuard uses it: one key for
//! the batch, a 64-bit counter as nonce of each packet, and no associated data. Made for transport
//! sessions of `agent/wireguard` that seal everything that one read of the TUN returned, and open
//! everything that was received at once (`docs/decisions/0009-own-batch-aead.md`).
//!
//! # Contract
//!
//! - All packets of a batch are in one block of bytes, the arena ([`Packet`] says where). Each is
//!   followed by room for its tag. A batch may mix lengths. Nothing is allocated, except
//!   that `authentic` grows once to the size of the batch.
//! - The batch backends verify before they decipher, and leave a packet that is not authentic as it was.
//!   ring deciphers while it verifies, and overwrites such a packet with zeros. Either way its
//!   plaintext is not returned.
//! - The time that a call takes depends on the number and the lengths of the packets and on which
//!   of them are authentic, and not on the key, the counters or the bytes: no branch, no index and
//!   no instruction of variable time depends on them (`tests/timing.rs` measures it).
//! - The caller chooses counters. To seal two packets with one counter breaks the encryption.
//! - Whether a counter was received before (replay) is not judged here.
//! - Keys are wiped when they are dropped, except for ring's copy, which ring does not wipe.
//!   Registers and the stack are not wiped.
//!
//! # Backends
//!
//! | name | needs | ChaCha20 | Poly1305 |
//! |---|---|---|---|
//! | `avx512-ifma` | AVX2, AVX-512 F, BW, IFMA, VBMI2 | 16 blocks at once | 8 packets at once, radix 2^44 |
//! | `avx512vl` | AVX2, AVX-512 F, VL | 8 blocks at once | 4 packets at once, radix 2^26 |
//! | `avx2` | AVX2 | 8 blocks at once | 4 packets at once, radix 2^26 |
//! | `ring` | any CPU | ring, packet by packet | ring |
//!
//! [`Backend::select`] takes the first that the CPU has and that seals and opens as ring does
//! ([`Aead::Auto`]), or ring ([`Aead::Ring`]).
//!
//! In the batch backends a vector holds the same word of several packets, one packet a lane. That
//! makes both algorithms free of dependencies between lanes, so nothing has to be combined at the
//! end of a packet. Where there are fewer packets than lanes, a packet gets 2, 4, 8 or 16 lanes of
//! ChaCha20 for as many of its blocks.
//!
//! One or two packets of at most 192 bytes would leave most lanes empty. All batch backends seal and open
//! these one by one with AVX2, 4 blocks at once.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `choice` | the choice of a backend at start, and its comparison with ring |
//! | `backend` | which backends there are |
//! | `key` | a key, and the batches that it seals and opens |
//! | `packets` | lengths, and where packets are in the arena |
//! | `lanes` | division of packets into blocks, for the batch backends |
//! | `poly1305` | Poly1305 of one packet, and the last step of every tag |
//! | `fallback` | ring |
//! | `x86` | the batch backends; the only module with `unsafe` |
//! | `internals` | every backend of this CPU, nonces and associated data, for tests and benchmarks |

#![deny(unsafe_code)]
#![deny(clippy::undocumented_unsafe_blocks)]

mod backend;
mod choice;
mod fallback;
#[doc(hidden)]
pub mod internals;
mod key;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod packets;
#[cfg(target_arch = "x86_64")]
mod poly1305;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use backend::Backend;
pub use choice::Aead;
pub use key::Key;
pub use packets::{KEY_BYTES, MAX_PACKET_BYTES, Misplaced, Packet, TAG_BYTES};
