//! Tests the lab itself: its hosts, routers, captures and traffic generators, without Towline.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use towline_tests::lab::capture::Capture;
use towline_tests::lab::netns_exec::netns_exec;
use towline_tests::lab::ping::{echoes, first_reply};
use towline_tests::lab::process::Program;
use towline_tests::lab::topology::{CloudAndWorker, Host};
use towline_tests::lab::traffic::{Pattern, tcp_both_ways};

/// Longest wait for what must happen. It only bounds a failing test.
const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn who_is_behind_a_router_reaches_the_internet_and_is_not_reached() {
    netns_exec("who_is_behind_a_router_reaches_the_internet_and_is_not_reached", |rank| {
        let CloudAndWorker { cp, worker, router, lab: _lab } = CloudAndWorker::build(rank).unwrap();
        let pattern = Pattern::random().unwrap();
        let ask = |from: &Host, to: IpAddr| {
            echoes(from.namespace(), to, 2, TIMEOUT, pattern).unwrap().received
        };
        for address in cp.addresses() {
            assert_eq!(ask(&worker, *address), 2, "{address} from behind the router");
        }
        for address in router.host().addresses() {
            assert_eq!(ask(&cp, *address), 2, "the router itself answers at {address}");
        }
        let worker_v6 = worker.addresses().iter().find(|address| address.is_ipv6()).unwrap();
        let outside =
            echoes(cp.namespace(), *worker_v6, 1, Duration::from_millis(200), pattern).unwrap();
        assert_eq!(outside.received, 0, "{worker_v6} must not be reachable from outside");
    });
}

#[test]
fn transfers_are_verified_and_a_capture_finds_them_in_clear() {
    netns_exec("transfers_are_verified_and_a_capture_finds_them_in_clear", |rank| {
        let CloudAndWorker { cp, worker, router: _router, lab } =
            CloudAndWorker::build(rank).unwrap();
        let pattern = Pattern::random().unwrap();
        let capture = Capture::start(lab.internet(), pattern).unwrap();
        let cloud = cp.addresses()[0];
        let [there, back] =
            tcp_both_ways(worker.namespace(), cp.namespace(), cloud, 3_000_000, pattern, |_| ())
                .unwrap();
        assert!(there.bytes >= 3_000_000 && back.bytes == there.bytes);
        let other = Pattern::random().unwrap();
        echoes(worker.namespace(), cloud, 1, TIMEOUT, other).unwrap();
        let seen = capture.stop().unwrap();
        assert_eq!(seen.missed, 0);
        assert_eq!((seen.wireguard, seen.inner_addresses), (0, 0));
        assert!(seen.bytes > 6_000_000, "both directions were seen: {seen:?}");
        assert!(seen.marked > 0 && seen.marked < seen.frames, "{seen:?}");
    });
}

#[test]
fn a_capture_counts_watched_addresses() {
    netns_exec("a_capture_counts_watched_addresses", |rank| {
        let CloudAndWorker { cp, worker, router: _router, lab } =
            CloudAndWorker::build(rank).unwrap();
        let capture = Capture::start(lab.internet(), Pattern::random().unwrap()).unwrap();
        capture.watch(["203.0.113.10/32".parse().unwrap()]);
        echoes(worker.namespace(), cp.addresses()[0], 1, TIMEOUT, Pattern::random().unwrap())
            .unwrap();
        let seen = capture.stop().unwrap();
        assert!(seen.inner_addresses >= 2, "a request and its reply: {seen:?}");
        assert_eq!(seen.marked, 0);
    });
}

#[test]
fn a_first_reply_waits_for_its_link() {
    netns_exec("a_first_reply_waits_for_its_link", |rank| {
        let CloudAndWorker { cp, worker, router: _router, lab: _lab } =
            CloudAndWorker::build(rank).unwrap();
        let start = Instant::now();
        let target = cp.addresses()[0];
        let at = first_reply(worker.namespace(), target, "eth0", start + TIMEOUT).unwrap();
        assert!(at.is_some_and(|at| at > start));
        let none = first_reply(worker.namespace(), target, "no-link", start).unwrap();
        assert_eq!(none, None, "without the link no packet is sent");
    });
}

#[test]
fn processes_end_with_their_host() {
    netns_exec("processes_end_with_their_host", |rank| {
        let CloudAndWorker { cp, worker, router: _router, lab } =
            CloudAndWorker::build(rank).unwrap();
        let log = lab.directory().join("log");
        let directory = lab.directory().to_owned();
        let sleeper = Program::new("sleep").arg("1000");
        let mut stopped = sleeper.start(worker.namespace(), "stopped", &log).unwrap();
        stopped.check().unwrap();
        stopped.stop().unwrap();
        let dropped = sleeper.start(worker.namespace(), "dropped", &log).unwrap();
        let pid = dropped.pid();
        drop(dropped);
        assert!(nix::sys::signal::kill(pid, None).is_err(), "the process still exists");
        let mut orphan = sleeper.start(cp.namespace(), "orphan", &log).unwrap();
        drop(cp);
        towline_tests::lab::interrupt::wait_for("end of the orphan", TIMEOUT, || {
            Ok(orphan.check().is_err().then_some(()))
        })
        .unwrap();
        drop(lab);
        assert!(!directory.exists(), "the lab's directory still exists");
    });
}

#[test]
fn commands_end_in_time() {
    netns_exec("commands_end_in_time", |rank| {
        let CloudAndWorker { cp, worker: _worker, router: _router, lab: _lab } =
            CloudAndWorker::build(rank).unwrap();
        let output = Program::new("cat").input("hello").run(cp.namespace(), TIMEOUT).unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(0), "hello"));
        let failed = Program::new("sh").args(["-c", "echo why >&2; exit 7"]);
        let error = failed.run_ok(cp.namespace(), TIMEOUT).unwrap_err().to_string();
        assert!(error.contains("status 7") && error.ends_with("why"), "{error}");
        let error = Program::new("sleep")
            .arg("1000")
            .run(cp.namespace(), Duration::from_millis(50))
            .unwrap_err();
        assert!(error.to_string().contains("`sleep 1000`"), "{error}");
    });
}
