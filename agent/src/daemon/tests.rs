//! Tests of whole agents in network namespaces, connected by static peers, on hosts with common
//! faults.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use towline_proto::pb;

use super::{Purpose, run};
use crate::cli::local::with_agent;
use crate::config::{Config, MetricsAddress};
use crate::state::StateDir;
use towline_dataplane::open_tun;
use towline_netlink::{AddressOptions, Rtnetlink, VethPeer};
use towline_netns::{NetworkNamespace, namespace_test};

/// Longest wait for a condition. It only bounds a failing test.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Outer address of each host, on the LAN.
const OUTER: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// Inner address of each host, in the tunnel.
const INNER: [&str; 2] = ["10.80.0.1", "10.80.0.2"];

/// Creates two hosts on one LAN.
fn hosts() -> [NetworkNamespace; 2] {
    let hosts = [(); 2].map(|()| NetworkNamespace::new());
    hosts[0].enter(|| {
        let peer = VethPeer { name: "eth0", namespace: Some(hosts[1].as_fd()) };
        Rtnetlink::open().unwrap().add_veth("eth0", peer).unwrap();
    });
    for (host, address) in hosts.iter().zip(OUTER) {
        host.enter(|| {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for name in ["lo", "eth0"] {
                let index = rtnetlink.link_index(name).unwrap();
                rtnetlink.set_up(index, true).unwrap();
            }
            let index = rtnetlink.link_index("eth0").unwrap();
            let prefix = format!("{address}/24").parse().unwrap();
            rtnetlink.add_address(index, prefix, AddressOptions::default()).unwrap();
        });
    }
    hosts
}

/// Returns the configuration of host `own`, whose peer is the other host.
fn configuration(directory: &Path, own: usize, peer_key: &str) -> Config {
    let (state, other) = (directory.join(format!("state{own}")), 1 - own);
    let text = format!(
        "state_dir = {state:?}\nsocket = {:?}\n[node]\naddresses = [\"{}\"]\n[[peer]]\nname = \"other\"\n\
         public_key = \"{peer_key}\"\nendpoint = \"{}:51830\"\nallowed_ips = [\"{}/32\"]\n",
        directory.join(format!("agent{own}.sock")),
        INNER[own],
        OUTER[other],
        INNER[other],
    );
    Config::parse(&text, Path::new("agent.toml")).unwrap()
}

/// Starts an agent on a host. It runs until the test's process ends.
fn start(host: &NetworkNamespace, config: Config) {
    let namespace: OwnedFd = host.as_fd().try_clone_to_owned().unwrap();
    std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
        run(config, None, Purpose::Node).unwrap();
    });
}

/// Waits for a status that satisfies `wanted`, and returns it.
fn status(config: &Config, wanted: impl Fn(&pb::StatusResponse) -> bool) -> pb::StatusResponse {
    let begun = Instant::now();
    loop {
        let status = with_agent(&config.socket, async |mut agent| {
            Ok(agent.status(pb::StatusRequest {}).await?.into_inner())
        });
        match status {
            Ok(status) if wanted(&status) => return status,
            other => assert!(begun.elapsed() < TIMEOUT, "{other:?}"),
        }
        std::thread::yield_now();
    }
}

/// Returns whether a datagram arrives through the tunnel.
fn carries(from: &NetworkNamespace, to: &NetworkNamespace) -> bool {
    let bind = |address: &str| UdpSocket::bind(format!("{address}:0")).unwrap();
    let receiver = to.enter(|| bind(INNER[1]));
    receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let port = receiver.local_addr().unwrap().port();
    let sender = from.enter(|| bind(INNER[0]));
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT {
        let to = SocketAddr::new(INNER[1].parse().unwrap(), port);
        let _ = sender.send_to(b"inside", to);
        if receiver.recv(&mut [0; 16]).is_ok() {
            return true;
        }
    }
    false
}

/// Sends a request as soon as there is a connection, and returns the answer.
fn ask<S: Read + Write>(connect: impl Fn() -> io::Result<S>, request: &str) -> String {
    let begun = Instant::now();
    let mut stream = loop {
        match connect() {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed() < TIMEOUT, "{error}"),
        }
        std::thread::yield_now();
    };
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn mount_disk(directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    mount(Some("disk"), directory, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
}

namespace_test! {
    fn agents_on_a_full_and_on_a_read_only_disk_carry_the_overlay() {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let hosts = hosts();
        if let Err(error) = hosts[0].enter(|| open_tun("probe0").map(drop)) {
            return println!("skipped: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let keys = [0, 1].map(|own| {
            let state = dir.path().join(format!("state{own}"));
            mount_disk(&state);
            StateDir::open(&state).unwrap().keys_or_generate().unwrap().wireguard.public()
        });
        let configs = [0, 1].map(|own| configuration(dir.path(), own, &keys[1 - own].to_string()));
        let filler = configs[0].state_dir.join("filler");
        let mut full = std::fs::File::create(&filler).unwrap();
        while std::io::Write::write_all(&mut full, &[0; 4_096]).is_ok() {}
        drop(full);
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, &configs[1].state_dir, none, read_only, none).unwrap();

        for (host, config) in hosts.iter().zip(&configs) {
            start(host, config.clone());
        }
        for (config, reason) in configs.iter().zip(["No space left", "Read-only file system"]) {
            let status = status(config, |status| status.applied == Some(true));
            let named = |problem: &String| problem.contains("counters.json") && problem.contains(reason);
            assert!(status.problems.iter().any(named), "{:?}", status.problems);
        }
        assert!(carries(&hosts[0], &hosts[1]));

        // Once the disk has room, no problem is left, and the start is stored.
        std::fs::remove_file(filler).unwrap();
        status(&configs[0], |status| status.problems.is_empty());
        assert!(StateDir::peek(&configs[0].state_dir).counters().unwrap().boot_epoch > 1);
    }
}

namespace_test! {
    fn an_agent_whose_name_is_taken_is_not_applied_until_it_is_free() {
        let hosts = hosts();
        if let Err(error) = hosts[0].enter(|| open_tun("probe0").map(drop)) {
            return println!("skipped: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state0")).unwrap();
        state.keys_or_generate().unwrap();
        let other = crate::keys::Wireguard::generate().unwrap().public().to_string();
        drop(state);
        let config = configuration(dir.path(), 0, &other);
        // This is another program's rule at one of Towline's priorities.
        let priority = config.routing.priority;
        use towline_netlink::{Family, Rule, RuleAction};
        let theirs = Rule::new(Family::V4, priority, RuleAction::Table(77));
        hosts[0].enter(|| Rtnetlink::open().unwrap().add_rule(&theirs).unwrap());
        start(&hosts[0], config.clone());
        let refused = status(&config, |status| status.applied.is_some());
        assert_eq!(refused.applied, Some(false));
        assert!(refused.applied_reason.contains(&priority.to_string()), "{refused:?}");
        hosts[0].enter(|| Rtnetlink::open().unwrap().delete_rule(&theirs).unwrap());
        let applied = status(&config, |status| status.applied == Some(true));
        assert_eq!(applied.applied_reason, "");
    }
}

namespace_test! {
    fn wg_show_and_metrics_show_every_peer() {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        let hosts = hosts();
        if let Err(error) = hosts[0].enter(|| open_tun("probe0").map(drop)) {
            return println!("skipped: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state0")).unwrap();
        let own = state.keys_or_generate().unwrap().wireguard.public();
        drop(state);
        let peer = crate::keys::Wireguard::generate().unwrap().public();
        let mut config = configuration(dir.path(), 0, &peer.to_string());
        let metrics: SocketAddr = "127.0.0.1:9586".parse().unwrap();
        config.metrics.listen = Some(MetricsAddress::Fixed(metrics));
        start(&hosts[0], config.clone());
        status(&config, |status| status.applied == Some(true));

        let socket = || UnixStream::connect("/run/wireguard/towline0.sock");
        let shown = ask(socket, "get=1\n\n");
        let key = format!("public_key={}", data_encoding::HEXLOWER.encode(&peer.0));
        for line in [
            "listen_port=51830",
            key.as_str(),
            "endpoint=192.0.2.2:51830",
            "allowed_ip=10.80.0.2/32",
        ] {
            assert!(shown.lines().any(|found| found == line), "{line}: {shown}");
        }
        assert!(shown.ends_with("errno=0\n\n"), "{shown}");
        assert!(!shown.contains("private_key") && !shown.contains("preshared_key"), "{shown}");
        assert_eq!(ask(socket, "set=1\nlisten_port=1\n\n"), "errno=-1\n\n");
        let notes = status(&config, |_| true).note_details;
        assert!(notes.iter().all(|note| !note.code.starts_with("wireguard-socket")), "{notes:?}");

        let connect = || hosts[0].enter(|| TcpStream::connect(metrics));
        let text = ask(connect, "GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n");
        for line in [
            "towline_host_applied 1",
            "towline_peer_up{peer=\"other\",origin=\"configuration\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains(&own.to_string()), "no key is a label");
    }
}
