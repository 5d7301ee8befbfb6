//! The lab: hosts as network namespaces that run the real binaries, with full cleanup.
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
//! | [`privilege`] | the right to create namespaces; a user namespace when the lab is not root |
//! | [`namespace`] | one network namespace, held by a thread; what runs inside it |
//! | [`topology`] | hosts, routers, links and addresses: a builder for any network |
//! | [`nat`] | NAT and firewall rules of routers, as nftables |
//! | [`binaries`] | building and finding the daemons |
//! | [`process`] | daemons and commands inside a host: logs, deadlines, guaranteed termination |
//! | [`clock`] | another time of day for the programs of one host |
//! | [`small_disk`] | a file system in memory, which only the processes of one host see |
//! | [`mesh`] | Towline in the lab: a controller, nodes, tokens, joins, agents |
//! | [`peers`] | other WireGuard implementations: built once, configured over their own sockets |
//! | [`capture`] | captures every packet on the simulated internet and searches it for leaks |
//! | [`traffic`], [`ping`] | generators that verify each byte and each reply |
//! | [`background_traffic`] | background traffic without pause, which a fault would leak |
//! | [`tamper`], [`spoof`] | changes by other programs on a host; spoofed packets from outside |
//! | [`actor`], [`raw_tunnel`], [`listener`] | local users, a member that ignores the rules, and receivers of what they send |
//! | [`unusual`], [`redirect`] | unusual packets that might bypass a guard, and eBPF redirects of a pod's packets |
//! | [`interference`] | what an evil relay does to the datagrams that it forwards |
//! | [`report`], [`output`] | promises, figures and the exit status; progress output |
//! | [`chart`] | parts of the charts that scenarios draw |
//! | [`keep_running`] | a lab that keeps running, and shells inside it |
//! | [`scenario`], [`cli`] | what `cargo lab NAME` runs |
//! | [`vm`] | booted machines: real kernels, systemd and power cuts, under QEMU |
//! | [`netns_exec`] | runs a `cargo test` test inside such hosts |
//! | [`scenario_test`] | runs a scenario as a `cargo test` test |
//!
//! # Invariants
//!
//! - `setns` is per thread: code that runs inside a host runs on a thread of its own or in a
//!   process; the main thread never changes its network namespace.
//! - Everything is owned: dropping a [`topology::Lab`] ends its processes, its namespaces and its
//!   directory, also while panicking. If the lab itself is killed, the kernel ends the processes
//!   (`PR_SET_PDEATHSIG`), and the namespaces end with them.
//! - Nothing waits by sleeping: [`interrupt::wait_for`] polls until a deadline, and every wait ends
//!   at Ctrl-C.
//! - The lab changes nothing on the machine outside its namespaces and its directory.

pub mod actor;
pub mod background_traffic;
pub mod binaries;
pub mod capture;
pub mod chart;
pub mod cli;
pub mod clock;
pub mod flow;
pub mod interference;
pub mod interrupt;
pub mod keep_running;
pub mod listener;
pub mod mesh;
pub mod namespace;
pub mod nat;
pub mod netns_exec;
pub mod output;
pub mod package;
pub mod peers;
pub mod ping;
pub mod privilege;
pub mod process;
pub mod raw_tunnel;
pub mod redirect;
pub mod report;
pub mod scenario;
pub mod scenario_test;
pub mod small_disk;
pub mod spoof;
pub mod tamper;
pub mod topology;
pub mod traffic;
pub mod unusual;
pub mod vm;
pub mod wire;
