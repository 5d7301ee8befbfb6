//! The lab: hosts as network namespaces, the real binaries inside them, and nothing left behind.
//!
//! ```text
//!                       the internet: namespace `internet`
//!            ┌───────────────── bridge net0 ─────────────────┐      203.0.113.0/24
//!            │  every port is captured                       │      2001:db8::/64
//!     ┌──────┴──────┐         ┌──────┴──────┐         ┌──────┴──────┐
//!     │ cp          │         │ router-a    │         │ router-b    │  public .10, .11, .12
//!     │ controller  │         │ masquerade  │         │ masquerade  │
//!     │ agent       │         │ bridge lan0 │         │ bridge lan0 │  192.168.1.0/24, 192.168.2.0/24
//!     └─────────────┘         └──────┬──────┘         └──────┬──────┘
//!                             ┌──────┴──────┐         ┌──────┴──────┐
//!                             │ worker-a    │         │ worker-b    │
//!                             │ agent       │         │ agent       │
//!                             └─────────────┘         └─────────────┘
//! ```
//!
//! # Parts, bottom up
//!
//! | module | owns |
//! |---|---|
//! | [`privilege`] | the right to make namespaces; a user namespace when we are not root |
//! | [`namespace`] | one network namespace, held by a thread; what runs inside it |
//! | [`topology`] | hosts, routers, links and addresses: a builder for any picture |
//! | [`nat`] | what routers do to packets, by nftables |
//! | [`binaries`] | building and finding the daemons |
//! | [`process`] | daemons and commands inside a host: logs, deadlines, an end for sure |
//! | [`mesh`] | Towline in the lab: a controller, nodes, tokens, joins, agents |
//! | [`peers`] | other WireGuards: built once, configured over their own sockets |
//! | [`capture`] | every packet on the simulated internet, searched for what must not be there |
//! | [`traffic`], [`ping`] | generators that verify each byte and each reply |
//! | [`chatter`] | traffic without pause, that a fault would let out |
//! | [`meddle`], [`forge`] | what co-tenants do to a host, and what strangers send it |
//! | [`actor`], [`raw_tunnel`], [`ear`] | local users, a member without rules, and who hears what they send |
//! | [`unusual`], [`redirect`] | packets that look as if they might pass a guard, or a pod's past the stack |
//! | [`report`], [`talk`] | promises, figures and the exit status; progress for people |
//! | [`keep`] | a lab that stays up, and shells inside it |
//! | [`scenario`], [`cli`] | what `cargo lab NAME` runs |
//! | [`vm`] | booted machines: real kernels, systemd and power cuts, under QEMU |
//! | [`inside`] | the same hosts for `cargo test` |
//!
//! # Invariants
//!
//! - `setns` is per thread: whatever runs inside a host runs on a thread of its own or in a
//!   process; the main thread never changes its network namespace.
//! - Everything is owned: dropping a [`topology::Lab`] ends its processes, its namespaces and its
//!   directory, also while panicking. Were the lab itself killed, the kernel would end the
//!   processes (`PR_SET_PDEATHSIG`), and the namespaces go with them.
//! - Nothing waits by sleeping: [`interrupt::wait_for`] polls until a deadline, and every wait ends
//!   at Ctrl-C.
//! - Nothing on the machine outside the lab's namespaces and its directory changes.

pub mod actor;
pub mod binaries;
pub mod capture;
pub mod chatter;
pub mod cli;
pub mod ear;
pub mod flow;
pub mod forge;
pub mod inside;
pub mod interrupt;
pub mod keep;
pub mod meddle;
pub mod mesh;
pub mod namespace;
pub mod nat;
pub mod package;
pub mod peers;
pub mod ping;
pub mod privilege;
pub mod process;
pub mod raw_tunnel;
pub mod redirect;
pub mod report;
pub mod scenario;
pub mod talk;
pub mod topology;
pub mod traffic;
pub mod unusual;
pub mod vm;
pub mod wire;
