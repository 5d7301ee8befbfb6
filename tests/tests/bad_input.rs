//! Gives bad input to running daemons and commands. Each must fail with one clear line and a status
//! other than 0, and nothing may be lost or partly written.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use towline_proto::token::JoinToken;
use towline_tests::lab::binaries::{Binaries, Profile};
use towline_tests::lab::interrupt::wait_for;
use towline_tests::lab::mesh::{Controller, Node, Token, require_tunnel};
use towline_tests::lab::netns_exec::netns_exec;
use towline_tests::lab::ping::echoes;
use towline_tests::lab::privilege::Rank;
use towline_tests::lab::process::CommandOutput;
use towline_tests::lab::topology::{CloudAndWorker, Host, Lab, Router};
use towline_tests::lab::traffic::{Pattern, random_bytes};

/// Longest wait for what must happen. It only bounds a failing test.
const LIMIT: Duration = Duration::from_secs(60);

/// A cloud host with a controller, and a worker behind NAT.
struct World {
    controller: Controller,
    cp: Arc<Host>,
    worker: Arc<Host>,
    binaries: Binaries,
    _router: Router,
    lab: Lab,
}

impl World {
    fn new(rank: Rank) -> anyhow::Result<Self> {
        let binaries = Binaries::build(Profile::Dev)?;
        let CloudAndWorker { cp, worker, router, lab } = CloudAndWorker::build(rank)?;
        let controller = Controller::start(&lab, &cp, &binaries)?;
        Ok(Self { controller, cp, worker, binaries, _router: router, lab })
    }

    fn token(&self, flags: &[&str]) -> anyhow::Result<Token> {
        self.controller.operator().token_with(flags)
    }

    /// Creates a node on the worker's host.
    fn machine(&self, name: &str) -> anyhow::Result<Node> {
        Node::new(&self.lab, &self.worker, name, &self.binaries, "")
    }

    /// Starts a node on each host, and waits for the tunnel between them.
    fn tunnel(&self) -> anyhow::Result<(Node, Node)> {
        let mut cp = Node::new(&self.lab, &self.cp, "cp", &self.binaries, "")?;
        let mut worker = self.machine("worker-a")?;
        for node in [&mut cp, &mut worker] {
            node.join(&self.token(&[])?)?;
            node.launch()?;
            node.await_status(LIMIT)?;
        }
        require_tunnel(&worker, &cp, LIMIT)?;
        Ok((cp, worker))
    }

    /// Runs `towline join` for a node, with this name and token.
    fn join(&self, machine: &Node, name: &str, token: &str) -> anyhow::Result<CommandOutput> {
        let file = self.lab.directory().join("given-token");
        std::fs::write(&file, token)?;
        let file = file.to_str().context("a plain path")?;
        machine.command(&["join", "--token-file", file, "--name", name])
    }

    fn node_names(&self) -> anyhow::Result<Vec<String>> {
        Ok(self.controller.operator().nodes()?.into_iter().map(|node| node.name).collect())
    }
}

/// Asserts exit status 1, nothing on stdout, and one line on stderr that contains every part.
fn assert_refused(output: &CommandOutput, says: &[&str]) {
    let line = &output.stderr;
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert_eq!(output.stdout, "");
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    for part in says {
        assert!(line.contains(part), "`{part}` is missing in: {line}");
    }
}

/// Asserts that a daemon refuses to start, and that its last line contains every part.
fn assert_ends(daemon: &mut towline_tests::lab::process::Daemon, says: &[&str]) {
    let end = wait_for("end of the daemon", LIMIT, || Ok(daemon.check().err()))
        .expect("a daemon that refuses to start");
    assert!(end.to_string().contains("status 1"), "{end}");
    let words = daemon.last_words();
    let line = words.lines().last().unwrap_or_default();
    for part in says {
        assert!(line.contains(part), "`{part}` is missing in: {line}");
    }
}

#[test]
fn tokens_that_admit_nobody() {
    netns_exec("tokens_that_admit_nobody", |rank| {
        let world = World::new(rank).unwrap();
        let machine = world.machine("machine").unwrap();
        let refused = |token: &str, says: &[&str]| {
            assert_refused(&world.join(&machine, "machine", token).unwrap(), says);
            assert!(world.node_names().unwrap().is_empty(), "a node joined");
        };

        let good = world.token(&[]).unwrap();
        let whole: JoinToken = good.token.parse().unwrap();
        refused(&good.token[..good.token.len() - 4], &["damaged", "copied whole"]);
        let mut wrong = whole.clone();
        wrong.secret.0[0] ^= 1;
        refused(&wrong.encode(), &["secret", &good.id]);
        let mut unknown = whole.clone();
        unknown.id.0[0] ^= 1;
        refused(&unknown.encode(), &["not known here"]);
        let mut other_ca = whole;
        other_ca.ca.0[0] ^= 1;
        refused(&other_ca.encode(), &["not this mesh's controller"]);

        let revoked = world.token(&[]).unwrap();
        world.controller.operator().command_ok(&["token", "revoke", &revoked.id]).unwrap();
        refused(&revoked.token, &["revoked", "token create"]);

        let brief = world.token(&["--ttl", "1s"]).unwrap();
        wait_for("expiry of a token", LIMIT, || {
            let tokens = world.controller.operator().tokens()?;
            Ok(tokens
                .iter()
                .find(|token| token.id == brief.id && token.state == "expired")
                .cloned())
        })
        .unwrap();
        refused(&brief.token, &["expired", "token create"]);

        let elsewhere = world.token(&["--name", "db-*"]).unwrap();
        refused(&elsewhere.token, &["db-*", "`machine`"]);

        // No refused token used up the good one, and the machine still can join.
        machine.join(&good).unwrap();
        let second = world.machine("second").unwrap();
        let used = world.join(&second, "second", &good.token).unwrap();
        assert_refused(&used, &["has been used", "token create"]);
        assert_eq!(world.node_names().unwrap(), ["machine"]);
    });
}

#[test]
fn names_that_are_refused_and_joins_that_change_nothing() {
    netns_exec("names_that_are_refused_and_joins_that_change_nothing", |rank| {
        let world = World::new(rank).unwrap();
        let first = world.machine("first").unwrap();
        first.join(&world.token(&[]).unwrap()).unwrap();
        let second = world.machine("second").unwrap();
        let token = world.token(&[]).unwrap();
        for name in ["No_Label", "dash-", "", ".", "localhost", "under_score.example"] {
            assert_refused(&world.join(&second, name, &token.token).unwrap(), &[]);
        }
        let taken = world.join(&second, "first", &token.token).unwrap();
        assert_refused(&taken, &["`first` is taken", "--replace"]);

        // A second join changes nothing, and neither needs nor uses a token.
        let again = world.join(&first, "first", &token.token).unwrap();
        assert!(again.status.success(), "{}", again.stderr);
        let renamed = world.join(&first, "another", &token.token).unwrap();
        assert_refused(&renamed, &["`first`", "towline leave"]);
        second.join(&token).unwrap();

        // The same WireGuard key with another identity: a state directory that was copied in part.
        let copy = world.machine("copy").unwrap();
        let _ = world.join(&copy, "copy", "no token").unwrap();
        std::fs::create_dir_all(copy.state()).unwrap();
        std::fs::copy(first.state().join("wireguard.key"), copy.state().join("wireguard.key"))
            .unwrap();
        let token = world.token(&[]).unwrap();
        let held = world.join(&copy, "copy", &token.token).unwrap();
        assert_refused(&held, &["is in use by node `first`"]);
        assert_eq!(world.node_names().unwrap(), ["first", "second"]);

        let replacement = world.token(&["--replace", "first"]).unwrap();
        let fresh = world.machine("fresh").unwrap();
        let output = world.join(&fresh, "first", &replacement.token).unwrap();
        assert!(output.status.success(), "{}", output.stderr);
        assert_eq!(world.node_names().unwrap(), ["first", "second"]);
    });
}

#[test]
fn agents_that_cannot_start_disturb_nobody() {
    netns_exec("agents_that_cannot_start_disturb_nobody", |rank| {
        let world = World::new(rank).unwrap();
        let (cp, mut worker) = world.tunnel().unwrap();

        let twice = worker.command(&["agent"]).unwrap();
        assert_refused(&twice, &["another agent", "state_dir"]);

        let start = |name: &str, more: &str| {
            let node = Node::new(&world.lab, &world.worker, name, &world.binaries, more).unwrap();
            node.join(&world.token(&[]).unwrap()).unwrap();
            let output = node.command(&["agent"]).unwrap();
            assert_eq!(output.stdout, "");
            assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
            let last = output.stderr.trim_end().lines().last().unwrap_or_default();
            assert!(last.starts_with("towline: "), "{}", output.stderr);
            last.to_owned()
        };
        let busy = start("same-port", "[link]\nname = \"towline9\"\n");
        assert!(busy.contains("51830") && busy.contains("in use"), "{busy}");
        let taken = start("same-link", "[wireguard]\nport = 51831\n");
        assert!(taken.contains("towline0"), "{taken}");
        let foreign = start("no-tun", "[link]\nname = \"eth0\"\n[wireguard]\nport = 51832\n");
        assert!(foreign.contains("eth0"), "{foreign}");

        worker.agent().unwrap().check().unwrap();
        let target = cp.status().unwrap().overlay_addresses[0];
        let pattern = Pattern::random().unwrap();
        let replies = echoes(world.worker.namespace(), target, 5, LIMIT, pattern).unwrap();
        assert_eq!(replies.received, 5, "the running agent carries on");
    });
}

#[test]
fn random_bytes_harm_nobody() {
    netns_exec("random_bytes_harm_nobody", |rank| {
        let world = World::new(rank).unwrap();
        let (mut cp, mut worker) = world.tunnel().unwrap();

        let cloud = world.cp.addresses()[0];
        let grpc = world.controller.address();
        world
            .worker
            .namespace()
            .run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                let noise: [u8; 2048] = random_bytes()?;
                for length in 0..1400 {
                    let mut datagram = noise[length % 600..][..length].to_vec();
                    // Half of the datagrams begin like one of Towline's.
                    if let Some(first) = datagram.first_mut()
                        && length % 2 == 0
                    {
                        *first = [1, 2, 3, 4, 0, 0x50][length / 2 % 6];
                    }
                    socket.send_to(&datagram, SocketAddr::new(cloud, 51830))?;
                }
                for start in 0..20 {
                    let mut stream = TcpStream::connect_timeout(&grpc, LIMIT)?;
                    stream.set_read_timeout(Some(LIMIT))?;
                    stream.write_all(&noise[start * 50..][..1000])?;
                    // The connection is answered or closed; either way it ends.
                    let _ = stream.read(&mut [0; 1024]);
                }
                Ok(())
            })
            .unwrap();

        for node in [&mut cp, &mut worker] {
            node.agent().unwrap().check().unwrap();
        }
        assert_eq!(world.node_names().unwrap().len(), 2, "the controller answers");
        let target = cp.status().unwrap().overlay_addresses[0];
        let pattern = Pattern::random().unwrap();
        let replies = echoes(world.worker.namespace(), target, 5, LIMIT, pattern).unwrap();
        assert_eq!(replies.received, 5, "the tunnel carries on");
    });
}

#[test]
fn a_damaged_store_is_refused_and_left_alone() {
    netns_exec("a_damaged_store_is_refused_and_left_alone", |rank| {
        let mut world = World::new(rank).unwrap();
        let state = world.controller.operator().state().to_owned();
        let machine = world.machine("machine").unwrap();
        machine.join(&world.token(&[]).unwrap()).unwrap();

        let listen = world.controller.address().to_string();
        let second = world.controller.operator().command(&["serve", "--listen", &listen]).unwrap();
        assert_refused(&second, &["another controller uses"]);

        world.controller.daemon().unwrap().kill().unwrap();
        let stores: Vec<_> = std::fs::read_dir(&state)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "redb"))
            .collect();
        let [store] = &stores[..] else { panic!("one store in {}", state.display()) };
        let sound = std::fs::read(store).unwrap();
        let mut scribbled = sound.clone();
        for byte in scribbled.iter_mut().take(4096) {
            *byte ^= 0x5a;
        }
        for damaged in [sound[..sound.len() / 2].to_vec(), scribbled] {
            std::fs::write(store, &damaged).unwrap();
            world.controller.launch().unwrap();
            assert_ends(world.controller.daemon().unwrap(), &["damaged", "backup"]);
            // The store's own header may change; no page after it does.
            let after = std::fs::read(store).unwrap();
            assert!(after[4096..] == damaged[4096..], "the damaged store has changed");
        }
        std::fs::write(store, &sound).unwrap();
        world.controller.restart().unwrap();
        assert_eq!(world.node_names().unwrap(), ["machine"], "the backup is whole");
    });
}
