//! Tests that find programs that may redirect packets past nftables.

use std::ffi::c_int;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use towline_netlink::codec::Message;
use towline_netlink::{Connection, Protocol, Rtnetlink};
use towline_netns::{add_link, namespace_test, root_namespace_test};

use crate::{HostNetwork, PastNetfilter};

const OWN: &str = "towline0";

fn found() -> Option<PastNetfilter> {
    HostNetwork::open().unwrap().past_netfilter(OWN).unwrap()
}

fn program_on(link: &str) -> Option<PastNetfilter> {
    Some(PastNetfilter::Program(link.to_owned()))
}

namespace_test! {
    fn an_ordinary_host_redirects_nothing() {
        add_link("eth0");
        assert_eq!(found(), None);
    }
}

namespace_test! {
    fn plugins_are_known_by_their_links() {
        add_link("eth0");
        for (name, plugin) in
            [("bpfin.cali", PastNetfilter::Calico), ("cilium_host", PastNetfilter::Cilium)]
        {
            Rtnetlink::open().unwrap().add_bridge(name).unwrap();
            assert_eq!(found(), Some(plugin.clone()));
            let text = plugin.to_string();
            assert!(text.contains(" may redirect packets past nftables: only the unreachable routes"));
            assert!(!text.contains("  "), "{text}");
        }
    }
}

/// Loads an eBPF program of traffic control that accepts every packet.
fn program() -> OwnedFd {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        licence: u64,
        rest: [u64; 4],
    }
    // r0 = 0; exit.
    let instructions: [u64; 2] = [0xb7, 0x95];
    let load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        licence: c"".as_ptr() as u64,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `load` and what it points to, all of which outlives the call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    assert!(descriptor >= 0, "load: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(descriptor as c_int) }
}

/// Encodes `struct tcmsg`.
fn header(link: u32, handle: u32, parent: u32, information: u32) -> Vec<u8> {
    [0, link, handle, parent, information].into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn request(what: &str, kind: u16, fixed: &[u8], fill: impl FnOnce(&mut Message)) {
    const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let mut message = Message::new(kind, CREATE, fixed);
    fill(&mut message);
    let mut connection = Connection::open(Protocol::Route).unwrap();
    connection.request(|| what.to_owned(), message).unwrap();
}

const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const CLSACT: u32 = 0xffff_fff1;
const EGRESS: u32 = 0xffff_fff3;

fn add_clsact(link: u32) {
    request("add clsact", libc::RTM_NEWQDISC, &header(link, 0xffff_0000, CLSACT, 0), |message| {
        message.string(KIND, "clsact");
    });
}

root_namespace_test! {
    fn a_program_is_found_where_it_is_attached_by_a_filter() {
        const PROGRAM: u16 = 6;
        const NAME: u16 = 7;
        let uplink = add_link("eth0");
        add_clsact(uplink);
        assert_eq!(found(), None, "clsact alone does nothing");
        let program = program();
        let all = u32::from((libc::ETH_P_ALL as u16).to_be());
        let information = (1 << 16) | all;
        request(
            "add a filter",
            libc::RTM_NEWTFILTER,
            &header(uplink, 0, EGRESS, information),
            |message| {
                message.string(KIND, "bpf").nest(OPTIONS, |options| {
                    options.u32(PROGRAM, program.as_raw_fd() as u32).string(NAME, "test");
                });
            },
        );
        assert_eq!(found(), program_on("eth0"));
        let own = HostNetwork::open().unwrap().past_netfilter("eth0").unwrap();
        assert_eq!(own, None, "our own link is left out");
    }
}

root_namespace_test! {
    fn a_program_is_found_where_it_is_attached_by_tcx() {
        const BPF_LINK_CREATE: c_int = 28;
        const BPF_TCX_INGRESS: u32 = 46;
        #[repr(C)]
        struct Attach {
            program: u32,
            link: u32,
            kind: u32,
            flags: u32,
            rest: [u64; 4],
        }
        let pod = add_link("veth0");
        let program = program();
        let attach = Attach {
            program: program.as_raw_fd() as u32,
            link: pod,
            kind: BPF_TCX_INGRESS,
            flags: 0,
            rest: [0; 4],
        };
        // SAFETY: the kernel reads `attach`, of this size, which outlives the call.
        let attached = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attach, size_of::<Attach>())
        };
        if attached == -1 {
            return println!("skipped: no TCX: {}", std::io::Error::last_os_error());
        }
        assert_eq!(found(), program_on("veth0"));
        // SAFETY: the descriptor is new and has no other owner.
        drop(unsafe { OwnedFd::from_raw_fd(attached as c_int) });
        assert_eq!(found(), None);
    }
}
