//! Towline in the lab: a controller, tokens, nodes and their agents, run as an operator does,
//! through the real binaries and their command lines.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use serde::Deserialize;

use super::binaries::Binaries;
use super::interrupt::{wait_for, wait_up_to};
use super::process::{CommandOutput, Daemon, Program};
use super::topology::{Host, Lab};

/// Time limit of a command; one that takes longer hangs.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for a daemon to answer after its start; one that takes longer is broken, on a slow machine
/// too.
pub const START_LIMIT: Duration = Duration::from_secs(60);

/// A controller on a host.
#[derive(Debug)]
pub struct Controller {
    operator: Operator,
    address: SocketAddr,
    listen: String,
    advertise: Vec<SocketAddr>,
    /// Configuration file, if it has one.
    config: Option<PathBuf>,
    /// Environment variables of the process, beside those of the lab.
    environment: Vec<(String, String)>,
    log: PathBuf,
    daemon: Option<Daemon>,
}

/// An operator of a controller, who runs commands on its host with the administrator's credential.
#[derive(Debug, Clone)]
pub struct Operator {
    host: Arc<Host>,
    program: PathBuf,
    state: PathBuf,
}

/// A join token as `token create` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct Token {
    /// The whole token. It is a secret, though of a mesh that lives only as long as the lab.
    pub token: String,
    /// Id of the token, as in lists.
    pub id: String,
}

/// A node as `towline-controller node list` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedNode {
    /// Name of the node.
    pub name: String,
    /// True while the node has a live watch.
    pub online: bool,
    /// Generation of the record that the node published last.
    pub generation: Option<u64>,
    /// The node's addresses in the mesh.
    #[serde(default)]
    pub overlay_addresses: Vec<IpAddr>,
}

/// A token as `towline-controller token list` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedToken {
    /// Id of the token.
    pub id: String,
    /// State of the token: "open", "used", "expired" or "revoked".
    pub state: String,
}

/// A machine that is, or will become, a node of the mesh.
#[derive(Debug)]
pub struct Node {
    name: String,
    host: Arc<Host>,
    program: PathBuf,
    /// Command that wraps the node's programs, with its arguments; empty if they run directly.
    wrapper: Vec<String>,
    directory: PathBuf,
    agent: Option<Daemon>,
}

/// The part of `towline status -o json` that the lab reads.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The node's addresses in the mesh.
    pub overlay_addresses: Vec<IpAddr>,
    /// State of the connection to the controller.
    pub controller: ControllerStatus,
    /// Candidates that the node publishes.
    pub candidates: Vec<Candidate>,
    /// Problems that the operator should repair, one line each.
    pub problems: Vec<String>,
    /// Particularities of the host that need no repair, one line each. Earlier versions, with which
    /// benchmarks compare, report none.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Optional features of the data plane.
    #[serde(default)]
    pub features: Vec<Feature>,
    /// Number of batches that helpers of the workers encrypted.
    #[serde(default)]
    pub wireguard_sealed_ahead: u64,
}

/// An optional feature of the data plane.
#[derive(Debug, Clone, Deserialize)]
pub struct Feature {
    /// Name of the feature.
    pub name: String,
    /// True if it is in use.
    pub active: bool,
}

/// State of an agent's connection to its controller.
#[derive(Debug, Clone, Deserialize)]
pub struct ControllerStatus {
    /// True while the agent has a live watch.
    pub connected: bool,
    /// Address of the controller of the watch.
    pub address: Option<String>,
}

/// An address at which a node may be reached.
#[derive(Debug, Clone, Deserialize)]
pub struct Candidate {
    /// Address and port.
    pub address: SocketAddr,
}

impl Status {
    /// Returns the node's IPv4 address in the mesh.
    pub fn overlay_v4(&self) -> Option<IpAddr> {
        self.overlay_addresses.iter().copied().find(IpAddr::is_ipv4)
    }
}

/// The part of `towline peers -o json` that the lab reads.
#[derive(Debug, Clone, Deserialize)]
pub struct Peer {
    /// Name of the peer.
    pub name: String,
    /// State of the peer: "up", "connecting", "down" or "idle".
    pub state: String,
    /// Reason why the peer is not up.
    pub reason: Option<String>,
    /// Endpoint that datagrams are sent to, if the peer is up.
    pub path: Option<String>,
    /// Kind of the path, "direct" or "relay", if the peer is up.
    pub path_kind: Option<String>,
    /// Candidates of the peer.
    #[serde(default)]
    pub candidates: Vec<Candidate>,
    /// Name of the relay on the path, if there is one.
    pub relay: Option<String>,
    /// Size in bytes of the largest inner packet that fits the path, once known.
    pub mtu: Option<u32>,
    /// True if each datagram to the peer is sent by itself. Earlier versions do not report it.
    #[serde(default)]
    pub single_datagrams: bool,
}

impl Peer {
    /// Returns whether the peer's record is known, not only its grant.
    pub fn has_candidates(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Returns whether the peer is up.
    pub fn is_up(&self) -> bool {
        self.state == "up"
    }
}

impl Controller {
    /// Starts a controller as [`Self::start`] does, on all of the host's addresses.
    pub fn start_on_all(lab: &Lab, host: &Arc<Host>, binaries: &Binaries) -> anyhow::Result<Self> {
        let advertise = host.addresses().iter().map(|address| SocketAddr::new(*address, 7443));
        let listen = "[::]:7443".to_owned();
        Self::start_with(lab, host, binaries, listen, advertise.collect(), None)
    }

    /// Starts a controller with a configuration file as [`Self::start_on_all`] does.
    pub fn start_on_all_configured(
        lab: &Lab,
        host: &Arc<Host>,
        binaries: &Binaries,
        config: &Path,
    ) -> anyhow::Result<Self> {
        let advertise = host.addresses().iter().map(|address| SocketAddr::new(*address, 7443));
        let (listen, config) = ("[::]:7443".to_owned(), Some(config.to_owned()));
        Self::start_with(lab, host, binaries, listen, advertise.collect(), config)
    }

    /// Starts a controller as [`Self::start`] does, on all of the host's addresses. Nodes know it by
    /// this address alone.
    pub fn start_known_by(
        lab: &Lab,
        host: &Arc<Host>,
        binaries: &Binaries,
        address: IpAddr,
    ) -> anyhow::Result<Self> {
        let known = vec![SocketAddr::new(address, 7443)];
        Self::start_with(lab, host, binaries, "[::]:7443".to_owned(), known, None)
    }

    /// Starts a controller on a host's first address, port 7443, and waits until it answers.
    pub fn start(lab: &Lab, host: &Arc<Host>, binaries: &Binaries) -> anyhow::Result<Self> {
        let address = host.addresses().first().ok_or_else(|| anyhow!("the host has no address"))?;
        let address = SocketAddr::new(*address, 7443);
        Self::start_with(lab, host, binaries, address.to_string(), vec![address], None)
    }

    /// Starts a controller with a configuration file on a host's first address, port 7443, and waits until it answers.
    /// It advertises these addresses.
    pub fn start_configured(
        lab: &Lab,
        host: &Arc<Host>,
        binaries: &Binaries,
        config: &Path,
        advertise: Vec<SocketAddr>,
    ) -> anyhow::Result<Self> {
        let address = host.addresses().first().ok_or_else(|| anyhow!("the host has no address"))?;
        let listen = SocketAddr::new(*address, 7443).to_string();
        Self::start_with(lab, host, binaries, listen, advertise, Some(config.to_owned()))
    }

    /// Returns the state directory that a controller on this host gets.
    pub fn state_directory(lab: &Lab, host: &Host) -> PathBuf {
        Self::state_directory_in(lab.directory(), host.name())
    }

    /// Returns the same by the lab's directory and the host's name.
    pub fn state_directory_in(lab: &Path, host: &str) -> PathBuf {
        lab.join(format!("controller-{host}"))
    }

    fn start_with(
        lab: &Lab,
        host: &Arc<Host>,
        binaries: &Binaries,
        listen: String,
        advertise: Vec<SocketAddr>,
        config: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let address = host.addresses().first().ok_or_else(|| anyhow!("the host has no address"))?;
        let operator = Operator {
            host: Arc::clone(host),
            program: binaries.controller.clone(),
            state: Self::state_directory(lab, host),
        };
        let mut controller = Self {
            operator,
            address: SocketAddr::new(*address, 7443),
            listen,
            advertise,
            config,
            environment: Vec::new(),
            log: lab.directory().join(format!("controller-{}.log", host.name())),
            daemon: None,
        };
        controller.restart()?;
        Ok(controller)
    }

    /// Restarts the controller at another address of its host, and there alone. It advertises what it did
    /// before.
    pub fn move_to(&mut self, address: IpAddr) -> anyhow::Result<()> {
        self.address = SocketAddr::new(address, self.address.port());
        self.listen = self.address.to_string();
        self.restart()
    }

    /// Starts or restarts the controller, and waits until it answers.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.launch()?;
        self.await_answer(START_LIMIT)
    }

    /// Starts or restarts the controller with the program of other binaries, which all later commands use too,
    /// and with these further flags of `serve`. Waits until it answers.
    pub fn replace(&mut self, binaries: &Binaries, flags: &[&str]) -> anyhow::Result<()> {
        if let Some(daemon) = self.take_daemon() {
            daemon.stop()?;
        }
        self.operator.program.clone_from(&binaries.controller);
        self.launch_with(flags)?;
        self.await_answer(START_LIMIT)
    }

    /// Gives the process these environment variables from the next start on.
    pub fn set_environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// Starts or restarts the controller, without waiting.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        self.launch_with(&[])
    }

    fn launch_with(&mut self, flags: &[&str]) -> anyhow::Result<()> {
        let mut program = self.operator.program(&["serve"]).args(["--listen", &self.listen]);
        for address in &self.advertise {
            program = program.args(["--advertise", &address.to_string()]);
        }
        if let Some(config) = &self.config {
            program = program.arg("--config").arg(config);
        }
        program = program.args(flags.iter().copied());
        for (name, value) in &self.environment {
            program = program.env(name, value);
        }
        // The previous process must end first, since it holds the port and the store.
        self.daemon = None;
        self.daemon =
            Some(program.start(self.operator.host.namespace(), "towline-controller", &self.log)?);
        Ok(())
    }

    /// Waits until the controller answers an operator.
    pub fn await_answer(&mut self, limit: Duration) -> anyhow::Result<()> {
        wait_for("answer from the controller", limit, || {
            if let Some(daemon) = &mut self.daemon {
                daemon.check()?;
            }
            Ok(self.operator.nodes().ok())
        })
        .map(drop)
    }

    /// Returns the controller's process, while it runs.
    pub fn daemon(&mut self) -> anyhow::Result<&mut Daemon> {
        self.daemon.as_mut().ok_or_else(|| anyhow!("the controller is not running"))
    }

    /// Takes the process, so that the caller can end it.
    pub fn take_daemon(&mut self) -> Option<Daemon> {
        self.daemon.take()
    }

    /// Returns the operator of this controller.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Returns the address at which agents reach the controller.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Operator {
    /// Returns the controller's state directory, which contains the operator's credential.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Runs `towline-controller ARGUMENTS --state-dir ...` on the controller's host.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<CommandOutput> {
        self.program(arguments).run(self.host.namespace(), COMMAND_LIMIT)
    }

    /// Runs a command as [`Self::command`] does. Returns its standard output if it exits with 0.
    pub fn command_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.program(arguments).run_ok(self.host.namespace(), COMMAND_LIMIT)
    }

    /// Creates a token for a node of this site.
    pub fn token(&self, site: &str) -> anyhow::Result<Token> {
        self.token_with(&["--site", site])
    }

    /// Creates a token with these flags of `token create`.
    pub fn token_with(&self, flags: &[&str]) -> anyhow::Result<Token> {
        let arguments = [&["token", "create", "-o", "json"], flags].concat();
        let output = self.command_ok(&arguments)?;
        serde_json::from_str(&output).context("cannot parse the output of `token create`")
    }

    /// Returns all nodes.
    pub fn nodes(&self) -> anyhow::Result<Vec<ListedNode>> {
        let output = self.command_ok(&["node", "list", "-o", "json"])?;
        serde_json::from_str(&output).context("cannot parse the output of `node list`")
    }

    /// Returns all tokens.
    pub fn tokens(&self) -> anyhow::Result<Vec<ListedToken>> {
        let output = self.command_ok(&["token", "list", "-o", "json"])?;
        serde_json::from_str(&output).context("cannot parse the output of `token list`")
    }

    /// Starts a command that runs until it is dropped, such as `publish`, on the controller's host.
    pub fn start(&self, arguments: &[&str], log: &Path) -> anyhow::Result<Daemon> {
        let name = arguments.first().copied().unwrap_or("towline-controller");
        self.program(arguments).start(self.host.namespace(), name, log)
    }

    fn program(&self, arguments: &[&str]) -> Program {
        Program::new(&self.program)
            .args(arguments.iter().copied())
            .arg("--state-dir")
            .arg(&self.state)
    }
}

impl Node {
    /// Creates a node with its own configuration: state, socket and log are in the lab's directory.
    /// `more` is appended to the configuration.
    pub fn new(
        lab: &Lab,
        host: &Arc<Host>,
        name: &str,
        binaries: &Binaries,
        more: &str,
    ) -> anyhow::Result<Self> {
        let directory = lab.directory().join(name);
        fs::create_dir(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let node = Self {
            name: name.to_owned(),
            host: Arc::clone(host),
            program: binaries.towline.clone(),
            wrapper: Vec::new(),
            directory,
            agent: None,
        };
        let text = format!(
            "state_dir = {:?}\nsocket = {:?}\n{more}",
            node.directory.join("state"),
            node.socket(),
        );
        fs::write(node.config(), text).context("cannot write the configuration")?;
        Ok(node)
    }

    /// Runs the node's programs through another program from now on: `words`, then the program and
    /// its arguments.
    pub fn wrap(&mut self, words: Vec<String>) {
        self.wrapper = words;
    }

    /// Returns the environment variables that the other program sets, if it is `env`.
    pub fn wrapped_environment(&self) -> impl Iterator<Item = (&str, &str)> {
        self.wrapper.iter().skip(1).filter_map(|word| word.split_once('='))
    }

    /// Uses the program of other binaries from the next start or command on.
    pub fn replace(&mut self, binaries: &Binaries) {
        self.program.clone_from(&binaries.towline);
    }

    /// Returns the node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the node's host.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Returns the path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// Returns the path of the agent's command-line socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// Returns the path of the state directory.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Runs `towline join` with the token in a file.
    pub fn join(&self, token: &Token) -> anyhow::Result<()> {
        let file = self.directory.join("token");
        // The file is created again each time, readable by its owner only.
        fs::remove_file(&file).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        let options =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
        std::io::Write::write_all(&mut &options, token.token.as_bytes())?;
        self.program(&["join", "--token-file"])
            .arg(&file)
            .args(["--name", &self.name])
            .run_ok(self.host.namespace(), COMMAND_LIMIT)
            .map(drop)
    }

    /// Runs `towline join` with the token on standard input.
    pub fn join_by_input(&self, token: &Token) -> anyhow::Result<()> {
        self.program(&["join", "--token-file", "-", "--name", &self.name])
            .input(&*token.token)
            .run_ok(self.host.namespace(), COMMAND_LIMIT)
            .map(drop)
    }

    /// Starts the agent, without waiting.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        // The previous process must end first, since it holds the port and the state directory.
        self.agent = None;
        let agent = self.program(&["agent"]).start(
            self.host.namespace(),
            &format!("the agent of {}", self.name),
            &self.log(),
        )?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Starts or restarts the agent, and waits until it answers.
    pub fn restart(&mut self) -> anyhow::Result<Status> {
        self.launch()?;
        self.await_status(START_LIMIT)
    }

    /// Has the agent read its configuration again.
    pub fn reload(&mut self) -> anyhow::Result<()> {
        Ok(kill(self.agent()?.pid(), Signal::SIGHUP)?)
    }

    /// Stops the agent and removes the map that it cached, so that the next start knows no other
    /// node.
    pub fn stop_and_forget_map(&mut self) -> anyhow::Result<()> {
        if let Some(agent) = self.take_agent() {
            agent.stop()?;
        }
        let map = self.state().join("map.bin");
        match fs::remove_file(&map) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", map.display()))
            }
            _ => Ok(()),
        }
    }

    /// Waits until the agent answers, and returns its status.
    pub fn await_status(&mut self, limit: Duration) -> anyhow::Result<Status> {
        let what = format!("answer from the agent of {}", self.name);
        wait_for(&what, limit, || {
            self.agent()?.check()?;
            Ok(self.status().ok())
        })
    }

    /// Returns the agent's process, while it runs.
    pub fn agent(&mut self) -> anyhow::Result<&mut Daemon> {
        self.agent.as_mut().ok_or_else(|| anyhow!("the agent of {} is not running", self.name))
    }

    /// Takes the agent's process, so that the caller can end it.
    pub fn take_agent(&mut self) -> Option<Daemon> {
        self.agent.take()
    }

    /// Returns the path of the log of the agent and of earlier commands.
    pub fn log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// Starts `towline --config ... ARGUMENTS` on the host, as a daemon.
    pub fn start(&self, arguments: &[&str]) -> anyhow::Result<Daemon> {
        let name = format!("`towline {}` on {}", arguments.join(" "), self.name);
        self.program(arguments).start(self.host.namespace(), &name, &self.log())
    }

    /// Runs `towline --config ... ARGUMENTS` on the host.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<CommandOutput> {
        self.program(arguments).run(self.host.namespace(), COMMAND_LIMIT)
    }

    /// Runs a command as [`Self::command`] does. Returns its standard output if it exits with 0.
    pub fn command_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.program(arguments).run_ok(self.host.namespace(), COMMAND_LIMIT)
    }

    /// Runs `towline status`.
    pub fn status(&self) -> anyhow::Result<Status> {
        let output = self.command_ok(&["status", "-o", "json"])?;
        serde_json::from_str(&output).context("cannot parse the output of `towline status`")
    }

    /// Returns the node's IPv4 address in the mesh, from `towline status`.
    pub fn overlay_v4(&self) -> anyhow::Result<IpAddr> {
        let address = self.status()?.overlay_v4();
        address.with_context(|| format!("{} has no IPv4 mesh address", self.name))
    }

    /// Runs `towline peers`.
    pub fn peers(&self) -> anyhow::Result<Vec<Peer>> {
        let output = self.command_ok(&["peers", "-o", "json"])?;
        serde_json::from_str(&output).context("cannot parse the output of `towline peers`")
    }

    /// Returns the peer of this name, from `towline peers`.
    pub fn peer(&self, name: &str) -> anyhow::Result<Option<Peer>> {
        Ok(self.peers()?.into_iter().find(|peer| peer.name == name))
    }

    /// Returns the output of `towline peers` in its form for people.
    pub fn peers_table(&self) -> anyhow::Result<String> {
        self.command_ok(&["peers"])
    }

    /// Returns the program `towline --config ... ARGUMENTS`, to be run on the host.
    pub fn program(&self, arguments: &[&str]) -> Program {
        let program = match self.wrapper.split_first() {
            Some((first, words)) => Program::new(first).args(words).arg(&self.program),
            None => Program::new(&self.program),
        };
        program.arg("--config").arg(self.config()).args(arguments.iter().copied())
    }
}

/// Waits until each of two nodes reports the other as up. If they do not within `limit`, returns
/// the reason that the node gives.
pub fn await_tunnel(a: &Node, b: &Node, limit: Duration) -> anyhow::Result<Option<String>> {
    let mut reason = String::new();
    let up = wait_up_to(limit, || {
        for (here, there) in [(a, b), (b, a)] {
            match here.peer(there.name())? {
                Some(peer) if peer.is_up() => {}
                Some(peer) => {
                    reason = peer.reason.unwrap_or_default();
                    return Ok(None);
                }
                None => {
                    reason = format!("{} does not list the peer", here.name());
                    return Ok(None);
                }
            }
        }
        Ok(Some(()))
    })?;
    Ok(if up.is_some() { None } else { Some(reason) })
}

/// Waits until each of two nodes reports the other as up. Fails with the reason that the node gives if they
/// do not within `limit`.
pub fn require_tunnel(a: &Node, b: &Node, limit: Duration) -> anyhow::Result<()> {
    match await_tunnel(a, b, limit)? {
        None => Ok(()),
        Some(reason) => bail!("tunnel {}/{} did not come up: {reason}", a.name(), b.name()),
    }
}
