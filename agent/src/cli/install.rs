//! `towline join --install`: one command that turns a machine into a node, for a person and for
//! cloud-init alike.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use rand::Rng as _;
use towline_proto::backoff::{Backoff, Jitter};
use towline_proto::id::NodeName;
use towline_proto::token::JoinToken;

use super::join::{JoinArgs, Parts};
use super::local::{runtime, said, with_agent};
use super::{Global, output, wait};
use crate::config::{Config, DEFAULT_PATH};
use crate::confirm::{self, Confirmation, Moment, Unconfirmed};
use crate::install::{TOKEN, Tree};
use crate::join::{JoinError, join_as};
use crate::node_ip;
use crate::state::StateDir;

#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    /// Install into this directory instead of the machine; its init system starts the agent
    #[arg(long, value_name = "DIR", requires = "install")]
    root: Option<PathBuf>,
    /// Address, with port, at which other nodes reach this one: a cloud's public address, or a
    /// forwarded port (can be repeated; only for a configuration that is not there yet)
    #[arg(long, value_name = "ADDRESS:PORT", requires = "install")]
    advertise: Vec<SocketAddr>,
    /// TCP port of this host that is reached outside the tunnel too, such as the API server's
    /// (can be repeated; only for a configuration that is not there yet)
    #[arg(long, value_name = "PORT", requires = "install")]
    plain_port: Vec<u16>,
    /// Try for this many seconds, then leave the reason and a timer that tries again
    #[arg(long, default_value_t = 300, value_name = "SECONDS", requires = "install")]
    timeout: u64,
    /// Undo everything after this many seconds, counted from the agent's start, unless `towline
    /// confirm` is run before: a way back if the mesh locks you out
    #[arg(long, value_name = "SECONDS", requires = "install",
          value_parser = clap::value_parser!(u64).range(1..=confirm::MAX_SECONDS))]
    confirm: Option<u64>,
}

#[derive(serde::Serialize)]
struct Report {
    name: String,
    /// What the kubelet is started with.
    node_ip: String,
    overlay_addresses: Vec<String>,
    already: bool,
}

/// Pauses between attempts to join.
const RETRY: Backoff =
    Backoff::new(Duration::from_millis(500), Duration::from_secs(5), Jitter::Half);

/// How a join is tried.
struct Attempt {
    /// Join even though the mesh cuts off the operator.
    force: bool,
    /// How long the confirmation may take, in seconds; `None`: none is needed.
    confirm: Option<u64>,
    /// How long it may be tried, in seconds.
    timeout: u64,
    /// When the trying ends.
    deadline: Instant,
}

/// A machine that is being installed.
struct Machine {
    tree: Tree,
    /// As the agent will read it.
    config: Config,
    /// The same with its paths as seen from here.
    outside: Config,
}

pub(super) fn run(global: &Global, args: JoinArgs) -> anyhow::Result<()> {
    let Parts { source, name, force, how, output: format } = args.parts();
    let deadline = Instant::now() + Duration::from_secs(how.timeout);
    let machine = Machine::prepare(global, &how)?;
    let already = machine.member(name.as_deref())?;
    if already {
        super::machine::refuse_down(&machine.outside)?;
        if how.confirm.is_some() {
            eprintln!("this machine is a member already: --confirm is not applied");
        }
    } else {
        let name = super::join::name(name)?;
        // Before anything is tried: a token that is none is never one.
        let text = source.read()?;
        let token: JoinToken = text.parse()?;
        machine.tree.keep_token(&text)?;
        let attempt = Attempt { force, confirm: how.confirm, timeout: how.timeout, deadline };
        machine.join(&token, &name, &attempt)?;
    }
    machine.tree.succeeded(&machine.config)?;
    machine.tree.start()?;
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(10));
    wait::until_up(&machine.outside.socket, &[], Some(left))
        .context("joined, and the agent is enabled; but")?;
    let report = machine.report(already)?;
    eprintln!(
        "{} `{}`; the mesh is up",
        if already { "this machine is already" } else { "joined as" },
        report.name
    );
    if let Confirmation::Due(left) = confirm::look(&machine.outside.state_dir, &Moment::now()) {
        eprintln!("run `towline confirm` within {} s, or the join is undone", left.as_secs());
    }
    match output::document(format, &report)? {
        Some(document) => output::print(&document),
        None => output::print(&format!("{}\n", report.node_ip)),
    }
}

impl Machine {
    /// Writes what the machine needs, and reads its configuration.
    fn prepare(global: &Global, how: &InstallArgs) -> anyhow::Result<Self> {
        let tree = Tree::new(how.root.as_deref());
        let changes = tree.install(&configuration(how)?)?;
        for path in &changes.written {
            eprintln!("wrote {}", path.display());
        }
        let fresh = changes.written.iter().any(|path| path == Path::new(DEFAULT_PATH));
        if !fresh && (!how.advertise.is_empty() || !how.plain_port.is_empty()) {
            eprintln!(
                "{DEFAULT_PATH} was there already: --advertise and --plain-port are not applied"
            );
        }
        let file = global.config.clone().unwrap_or_else(|| tree.path(DEFAULT_PATH));
        let mut config = Config::load(Some(&file))?;
        if let Some(directory) = &global.state_dir {
            config.state_dir.clone_from(directory);
        }
        if let Some(socket) = &global.socket {
            config.socket.clone_from(socket);
        }
        let mut outside = config.clone();
        outside.state_dir = tree.path(&config.state_dir);
        outside.socket = tree.path(&config.socket);
        Ok(Self { tree, config, outside })
    }

    /// Whether it is a member, under `name` if one is given.
    fn member(&self, name: Option<&str>) -> anyhow::Result<bool> {
        // A running agent holds the directory's lock; here it is only looked at.
        let state = StateDir::peek(&self.outside.state_dir);
        Ok(state.membership()?.is_some_and(|membership| {
            name.is_none_or(|name| membership.grant.name.as_str() == name)
        }))
    }

    fn join(&self, token: &JoinToken, name: &NodeName, attempt: &Attempt) -> anyhow::Result<()> {
        let Err(error) = self.keep_trying(token, name, attempt) else { return Ok(()) };
        // Who wants to confirm is there: a timer's join would need no confirmation.
        let again = error.downcast_ref::<JoinError>().is_some_and(JoinError::may_pass)
            && attempt.confirm.is_none();
        self.tree.failed(&self.config, &format!("{error:#}"), again)?;
        let next = if again {
            format!("not joined; towline-join.timer tries again with {TOKEN}")
        } else if attempt.confirm.is_some() {
            "not joined, and no timer tries again: the join would need a confirmation".to_owned()
        } else {
            "not joined, and trying again would not help".to_owned()
        };
        Err(error.context(next))
    }

    fn keep_trying(
        &self,
        token: &JoinToken,
        name: &NodeName,
        attempt: &Attempt,
    ) -> anyhow::Result<()> {
        let state = StateDir::lock(self.tree.state(&self.config)?)?;
        // Before the join: a machine that dies in the middle of it has not joined for good.
        match attempt.confirm {
            Some(seconds) => {
                let seconds = seconds.saturating_add(attempt.timeout);
                state.store_unconfirmed(&Unconfirmed::new(&Moment::now(), seconds))?;
            }
            None => state.forget_unconfirmed()?,
        }
        let result = self.try_until_joined(&state, token, name, attempt);
        match (&result, attempt.confirm) {
            (Err(_), _) => state.forget_unconfirmed()?,
            (Ok(()), Some(seconds)) => {
                state.store_unconfirmed(&Unconfirmed::new(&Moment::now(), seconds))?;
            }
            (Ok(()), None) => {}
        }
        result
    }

    fn try_until_joined(
        &self,
        state: &StateDir,
        token: &JoinToken,
        name: &NodeName,
        attempt: &Attempt,
    ) -> anyhow::Result<()> {
        let operator = super::join::operator(&self.config, attempt.force);
        let mark = self.config.routing.mark;
        let runtime = runtime()?;
        let mut failures = 0u32;
        loop {
            let joined = runtime.block_on(join_as(state, token, name, mark, &operator));
            let error = match joined {
                Ok(_) => return Ok(state.forget_undone()?),
                Err(error) => error,
            };
            let wait = RETRY.pause(failures, rand::rng().random());
            if !error.may_pass() || Instant::now() + wait >= attempt.deadline {
                return Err(error.into());
            }
            eprintln!("{error}; trying again");
            std::thread::sleep(wait);
            failures = failures.saturating_add(1);
        }
    }

    fn report(&self, already: bool) -> anyhow::Result<Report> {
        let node_ips: Vec<String> =
            node_ip::in_force(&self.outside)?.iter().map(|ip| ip.to_string()).collect();
        with_agent(&self.outside.socket, async |mut agent| {
            let request = towline_proto::pb::StatusRequest {};
            let status = agent.status(request).await.map_err(|status| said(&status))?.into_inner();
            Ok(Report {
                name: status.name,
                node_ip: node_ips.first().cloned().unwrap_or_default(),
                overlay_addresses: status.overlay_addresses,
                already,
            })
        })
    }
}

/// The configuration of a new machine: what was said, and defaults for the rest.
fn configuration(how: &InstallArgs) -> anyhow::Result<String> {
    let mut text =
        String::from("# Every key with its default: /usr/share/doc/towline/agent.toml\n");
    let mut section = |name: &str, key: &str, values: Vec<String>| {
        if !values.is_empty() {
            text.push_str(&format!("\n[{name}]\n{key} = [{}]\n", values.join(", ")));
        }
    };
    let quoted = |address: &SocketAddr| format!("\"{address}\"");
    section("node", "advertise", how.advertise.iter().map(quoted).collect());
    section("routing", "plain_ports", how.plain_port.iter().map(ToString::to_string).collect());
    // Said on the command line, so wrong here already.
    Config::parse(&text, Path::new(DEFAULT_PATH))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_configuration_says_what_was_said() {
        let how = InstallArgs {
            root: None,
            advertise: vec!["203.0.113.10:51830".parse().unwrap()],
            plain_port: vec![6443, 7443],
            timeout: 0,
            confirm: None,
        };
        let config = Config::parse(&configuration(&how).unwrap(), Path::new("x")).unwrap();
        assert_eq!(config.node.advertise, how.advertise);
        assert_eq!(config.routing.plain_ports, how.plain_port);
        let bad = InstallArgs { plain_port: vec![0], ..how };
        assert!(configuration(&bad).unwrap_err().to_string().contains("plain_ports"));
    }
}
