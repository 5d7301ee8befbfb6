//! Towline in the lab: a controller, tokens, nodes and their agents, by the real binaries and
//! their command lines, as an operator would.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::Deserialize;

use super::binaries::Binaries;
use super::interrupt::{wait_for, wait_up_to};
use super::process::{Daemon, Program, Said};
use super::topology::{Host, Lab};

/// A command of ours that is not done after this hangs.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// A daemon of ours that does not answer after this is broken.
pub const START_LIMIT: Duration = Duration::from_secs(20);

/// A controller on a host.
#[derive(Debug)]
pub struct Controller {
    operator: Operator,
    address: SocketAddr,
    listen: String,
    advertise: Vec<SocketAddr>,
    log: PathBuf,
    daemon: Option<Daemon>,
}

/// Who commands a controller, from its host, with the administrator's credential.
#[derive(Debug, Clone)]
pub struct Operator {
    host: Arc<Host>,
    program: PathBuf,
    state: PathBuf,
}

/// A join token as `token create` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct Token {
    /// The whole token: a secret, but of a mesh that lives as long as the lab.
    pub token: String,
    /// What names it in lists.
    pub id: String,
}

/// A node as `towline-controller node list` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedNode {
    /// Its name.
    pub name: String,
    /// Its watch is live.
    pub online: bool,
    /// Of the record that it published last.
    pub generation: Option<u64>,
    /// Its addresses in the mesh.
    #[serde(default)]
    pub overlay_addresses: Vec<IpAddr>,
}

/// A token as `towline-controller token list` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedToken {
    /// What names it.
    pub id: String,
    /// "open", "used", "expired" or "revoked".
    pub state: String,
}

/// A machine that is, or will be, a node of the mesh.
#[derive(Debug)]
pub struct Node {
    name: String,
    host: Arc<Host>,
    program: PathBuf,
    /// Words before the program's name; empty: it is run directly.
    wrapper: Vec<String>,
    directory: PathBuf,
    agent: Option<Daemon>,
}

/// What the lab reads of `towline status -o json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The node's addresses in the mesh.
    pub overlay_addresses: Vec<IpAddr>,
    /// How it stands with the controller.
    pub controller: ControllerStatus,
}

/// How an agent stands with its controller.
#[derive(Debug, Clone, Deserialize)]
pub struct ControllerStatus {
    /// The watch is live.
    pub connected: bool,
}

/// What the lab reads of `towline peers -o json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// "up", "connecting", "down" or "idle".
    pub state: String,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Where its datagrams go, when it is.
    pub path: Option<String>,
    /// "direct" or "relay", when it is.
    pub path_kind: Option<String>,
    /// Where it might be reached.
    #[serde(default)]
    pub candidates: Vec<serde_json::Value>,
    /// The relay's name, when there is one on the path.
    pub relay: Option<String>,
    /// The largest inner packet that the path takes, once known.
    pub mtu: Option<u32>,
}

impl Peer {
    /// Its record is known, not only its grant.
    pub fn has_candidates(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Its path carries traffic.
    pub fn is_up(&self) -> bool {
        self.state == "up"
    }
}

impl Controller {
    /// As [`Self::start`], on all of the host's addresses.
    pub fn start_on_all(lab: &Lab, host: &Arc<Host>, binaries: &Binaries) -> anyhow::Result<Self> {
        let advertise = host.addresses().iter().map(|address| SocketAddr::new(*address, 7443));
        Self::start_with(lab, host, binaries, "[::]:7443".to_owned(), advertise.collect())
    }

    /// Starts one on a host's first address, port 7443, and waits until it answers.
    pub fn start(lab: &Lab, host: &Arc<Host>, binaries: &Binaries) -> anyhow::Result<Self> {
        let address = host.addresses().first().ok_or_else(|| anyhow!("a host without address"))?;
        let address = SocketAddr::new(*address, 7443);
        Self::start_with(lab, host, binaries, address.to_string(), vec![address])
    }

    fn start_with(
        lab: &Lab,
        host: &Arc<Host>,
        binaries: &Binaries,
        listen: String,
        advertise: Vec<SocketAddr>,
    ) -> anyhow::Result<Self> {
        let address = host.addresses().first().ok_or_else(|| anyhow!("a host without address"))?;
        let operator = Operator {
            host: Arc::clone(host),
            program: binaries.controller.clone(),
            state: lab.directory().join(format!("controller-{}", host.name())),
        };
        let mut controller = Self {
            operator,
            address: SocketAddr::new(*address, 7443),
            listen,
            advertise,
            log: lab.directory().join(format!("controller-{}.log", host.name())),
            daemon: None,
        };
        controller.restart()?;
        Ok(controller)
    }

    /// Starts it (again) and waits until it answers.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.launch()?;
        self.await_answer(START_LIMIT)
    }

    /// Starts it (again), no more.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        let mut program = self.operator.program(&["serve"]).args(["--listen", &self.listen]);
        for address in &self.advertise {
            program = program.args(["--advertise", &address.to_string()]);
        }
        // The one before is gone first: it holds the port and the store.
        self.daemon = None;
        self.daemon =
            Some(program.start(self.operator.host.namespace(), "towline-controller", &self.log)?);
        Ok(())
    }

    /// Waits until it answers an operator.
    pub fn await_answer(&mut self, limit: Duration) -> anyhow::Result<()> {
        wait_for("answer from the controller", limit, || {
            if let Some(daemon) = &mut self.daemon {
                daemon.check()?;
            }
            Ok(self.operator.nodes().ok())
        })
        .map(drop)
    }

    /// The process, while it runs.
    pub fn daemon(&mut self) -> anyhow::Result<&mut Daemon> {
        self.daemon.as_mut().ok_or_else(|| anyhow!("the controller does not run"))
    }

    /// Takes the process, to end it.
    pub fn take_daemon(&mut self) -> Option<Daemon> {
        self.daemon.take()
    }

    /// Its operator.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Where agents reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Operator {
    /// The controller's state directory, with the credential.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Runs `towline-controller ARGUMENTS --state-dir ...` on its host.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<Said> {
        self.program(arguments).run(self.host.namespace(), COMMAND_LIMIT)
    }

    /// As [`Self::command`]; its standard output, if it ended with 0.
    pub fn command_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.program(arguments).run_ok(self.host.namespace(), COMMAND_LIMIT)
    }

    /// A new token for a node of this site.
    pub fn token(&self, site: &str) -> anyhow::Result<Token> {
        self.token_with(&["--site", site])
    }

    /// A new token with these flags of `token create`.
    pub fn token_with(&self, flags: &[&str]) -> anyhow::Result<Token> {
        let arguments = [&["token", "create", "-o", "json"], flags].concat();
        let said = self.command_ok(&arguments)?;
        serde_json::from_str(&said).context("`token create` printed something else")
    }

    /// Every node.
    pub fn nodes(&self) -> anyhow::Result<Vec<ListedNode>> {
        let said = self.command_ok(&["node", "list", "-o", "json"])?;
        serde_json::from_str(&said).context("`node list` printed something else")
    }

    /// Every token.
    pub fn tokens(&self) -> anyhow::Result<Vec<ListedToken>> {
        let said = self.command_ok(&["token", "list", "-o", "json"])?;
        serde_json::from_str(&said).context("`token list` printed something else")
    }

    fn program(&self, arguments: &[&str]) -> Program {
        Program::new(&self.program)
            .args(arguments.iter().copied())
            .arg("--state-dir")
            .arg(&self.state)
    }
}

impl Node {
    /// A machine with a configuration of its own: state, socket and log lie in the lab's directory.
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
            .with_context(|| format!("cannot make {}", directory.display()))?;
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

    /// Has its programs run by another one from now on: these words, then the program and its
    /// arguments.
    pub fn wrap(&mut self, words: Vec<String>) {
        self.wrapper = words;
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// Where its agent listens to the command line.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// `towline join` with the token in a file.
    pub fn join(&self, token: &Token) -> anyhow::Result<()> {
        let file = self.directory.join("token");
        // Written anew, for the owner's eyes only.
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

    /// `towline join` with the token on standard input.
    pub fn join_by_input(&self, token: &Token) -> anyhow::Result<()> {
        self.program(&["join", "--token-file", "-", "--name", &self.name])
            .input(&*token.token)
            .run_ok(self.host.namespace(), COMMAND_LIMIT)
            .map(drop)
    }

    /// Starts its agent, no more.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        // The one before is gone first: it holds the port and the state directory.
        self.agent = None;
        let agent = self.program(&["agent"]).start(
            self.host.namespace(),
            &format!("the agent of {}", self.name),
            &self.log(),
        )?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Ends its agent and takes away the map that it cached: the next start knows no other node.
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

    /// Waits until the agent answers, and gives its status.
    pub fn await_status(&mut self, limit: Duration) -> anyhow::Result<Status> {
        let what = format!("answer from the agent of {}", self.name);
        wait_for(&what, limit, || {
            self.agent()?.check()?;
            Ok(self.status().ok())
        })
    }

    /// The agent's process, while it runs.
    pub fn agent(&mut self) -> anyhow::Result<&mut Daemon> {
        self.agent.as_mut().ok_or_else(|| anyhow!("the agent of {} does not run", self.name))
    }

    /// Takes the agent's process, to end it.
    pub fn take_agent(&mut self) -> Option<Daemon> {
        self.agent.take()
    }

    /// What the agent says, and what ran before it.
    pub fn log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// Starts `towline --config ... ARGUMENTS` on the machine, as a daemon.
    pub fn start(&self, arguments: &[&str]) -> anyhow::Result<Daemon> {
        let name = format!("`towline {}` on {}", arguments.join(" "), self.name);
        self.program(arguments).start(self.host.namespace(), &name, &self.log())
    }

    /// Runs `towline --config ... ARGUMENTS` on the machine.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<Said> {
        self.program(arguments).run(self.host.namespace(), COMMAND_LIMIT)
    }

    /// As [`Self::command`]; its standard output, if it ended with 0.
    pub fn command_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.program(arguments).run_ok(self.host.namespace(), COMMAND_LIMIT)
    }

    /// `towline status`.
    pub fn status(&self) -> anyhow::Result<Status> {
        let said = self.command_ok(&["status", "-o", "json"])?;
        serde_json::from_str(&said).context("`towline status` printed something else")
    }

    /// `towline peers`.
    pub fn peers(&self) -> anyhow::Result<Vec<Peer>> {
        let said = self.command_ok(&["peers", "-o", "json"])?;
        serde_json::from_str(&said).context("`towline peers` printed something else")
    }

    /// How it stands with the peer of this name.
    pub fn peer(&self, name: &str) -> anyhow::Result<Option<Peer>> {
        Ok(self.peers()?.into_iter().find(|peer| peer.name == name))
    }

    /// `towline peers` as an operator reads it.
    pub fn peers_table(&self) -> anyhow::Result<String> {
        self.command_ok(&["peers"])
    }

    /// `towline --config ... ARGUMENTS`, to be run on the machine.
    pub fn program(&self, arguments: &[&str]) -> Program {
        let program = match self.wrapper.split_first() {
            Some((first, words)) => Program::new(first).args(words).arg(&self.program),
            None => Program::new(&self.program),
        };
        program.arg("--config").arg(self.config()).args(arguments.iter().copied())
    }
}

/// Waits until each of two nodes says that the other is up. `Ok(None)`: they are not after
/// `limit`; then the reason that the first one gives.
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
                    reason = format!("{} does not know it", here.name());
                    return Ok(None);
                }
            }
        }
        Ok(Some(()))
    })?;
    Ok(if up.is_some() { None } else { Some(reason) })
}
