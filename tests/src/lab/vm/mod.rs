//! Booted machines: real kernels and a real systemd under QEMU, which can lose power.
//!
//! ```text
//!   cp (QEMU)                    the lab's process                   worker (QEMU)
//!  ┌────────────────┐        ┌──────────────────────┐        ┌────────────────────────┐
//!  │ controller     │ frames │ switch, gateway, and │ frames │ agent, guard           │
//!  │ agent     eth0 ├────────┤ witness: counts what ├────────┤ eth0                   │
//!  │ runner         │        │ a machine leaks      │        │ runner                 │
//!  └──────┬─────────┘        └──────────────────────┘        │ background traffic     │
//!         └── commands, virtio-serial ──┴────────────────────┴────────────────────────┘
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`tools`] | which programs of the host are needed, and which packages have them |
//! | [`cache`] | the directory outside the checkout for what is built once, keyed by hash |
//! | [`image`] | the disk that every machine starts from |
//! | [`kernel`] | kernels of Debian's suites, their modules and the first program |
//! | [`accelerator`] | whether KVM boots a kernel here |
//! | [`disk`] | disks in layers, most of which machines share |
//! | [`machine`] | one QEMU process and its disk: boot, power cut, shutdown, saved states |
//! | `monitor` | QEMU's monitor: stops a processor, saves a state |
//! | `lines` | lines of text to and from QEMU |
//! | [`runner`] | commands in a machine, without its network |
//! | [`network`] | the switch between machines, and its gateway |
//! | [`witness`] | counts of the packets that left a machine: clear, plain, sealed |
//! | [`software`] | the package under test |
//! | [`pair`] | a control plane, and a worker that joined its mesh; their saved state |
//! | [`cases`] | the test cases |
//!
//! # Invariants
//!
//! - Root is not needed: machines exchange Ethernet frames with the lab over Unix sockets.
//! - Every wait is for a condition. Its limit is generous, since an emulated machine on a loaded
//!   host is ten times slower than a real one.
//! - A restored machine saves time, and decides nothing: boots, power cuts and shutdowns are real, and
//!   a machine that cannot be restored is booted.
//! - The thread that starts a machine owns it: QEMU ends with that thread.

pub mod accelerator;
pub mod cache;
pub mod cases;
pub mod disk;
pub mod image;
pub mod kernel;
mod lines;
pub mod machine;
mod monitor;
pub mod network;
pub mod pair;
pub mod runner;
pub mod software;
pub mod tools;
pub mod witness;
