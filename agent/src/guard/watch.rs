//! Keeps the guards installed while no agent runs (`towline guard --watch`).
//!
//! ```text
//!             the agent takes the lock
//!   guards ◄──────────────────────────────► passive
//!     ▲  │    the agent stopped or crashed
//!     └──┘
//!   another program removed a rule, a route or the table: it is restored
//! ```
//!
//! The lock of the state directory decides: an agent holds it exclusively, the guard shares it
//! while it works and is passive while it cannot get it. The nftables table is created without an
//! owner, so that the agent can adopt it.
//!
//! The host's network waits for the start of the guard, which systemd therefore never ends. What fails is tried again
//! for [`START_LIMIT`]. After that the ranges of the mesh and of static peers, and those networks of nodes that can be
//! read, are guarded, and the boot goes on; the whole plan is tried further.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use towline_core::plan::{Plan, RoutePlan, RouteVia};
use towline_core::prefixes::{covering, without};

use super::{Extent, Guarded, Prepared, Surroundings, enter, outcome};
use towline_service::notify::Notifier;

use crate::config::Config;
use crate::state::StateDir;
use towline_host::{CandidatePolicy, HostEvent, HostNetwork, Names, Problem, Watch};
use towline_netlink::NetlinkError;

/// Interval between checks of the lock and the files, which send no events.
const PERIOD: Duration = Duration::from_secs(1);

/// Time for which the start tries to install all guards.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Interval between attempts to install all guards while only those of a fallback are. Each attempt reads the
/// whole map under the lock that an agent waits for. A change of the files or of the host's networks begins the
/// next one at once.
const RETRY_PERIOD: Duration = Duration::from_secs(30);

/// Installs the guards and keeps them until a signal ends it. The guards stay installed then.
///
/// # Errors
///
/// Fails if at the start not even the ranges of the mesh can be guarded. Later failures are logged and retried.
pub fn watch(config: &Config) -> anyhow::Result<()> {
    watch_from(config, START_LIMIT)
}

/// Does the same as [`watch`], with this time for the start.
fn watch_from(config: &Config, limit: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let notifier = Notifier::from_environment();
        let mut keeper = Keeper::new(config.clone());
        let first = tokio::select! {
            first = start(&mut keeper, &notifier, limit) => first?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        let mut reported = first.to_string();
        tracing::info!("{reported}");
        notifier.status(&reported);
        notifier.ready();
        // A join starts the guard again, and so does the agent's unit.
        if first == Guarded::NotJoined {
            notifier.stopping();
            return Ok(());
        }
        loop {
            tokio::select! {
                () = keeper.changed() => {}
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
            let now = match keeper.check() {
                Ok(guarded) => guarded.to_string(),
                Err(error) => keeper.fall_back(&error),
            };
            if now != reported {
                tracing::info!("{now}");
                notifier.status(&now);
                reported = now;
            }
        }
        notifier.stopping();
        Ok(())
    })
}

/// Installs the guards for the first time, within `limit`.
async fn start(
    keeper: &mut Keeper,
    notifier: &Notifier,
    limit: Duration,
) -> anyhow::Result<Guarded> {
    let begun = Instant::now();
    let mut reported = String::new();
    loop {
        let (error, is_refused) = match keeper.check() {
            Ok(guarded) if keeper.is_whole() => return Ok(guarded),
            Ok(guarded) => (anyhow::anyhow!("{guarded}"), true),
            Err(error) => (error, false),
        };
        keeper.held = None;
        if begun.elapsed() >= limit {
            // The kernel, which refuses a part of the whole plan, would refuse one of these, too.
            let ranges = if is_refused { None } else { keeper.guard_ranges(&error).ok() };
            // The error of the whole plan says more than that of the ranges.
            return ranges.filter(|_| keeper.is_whole()).ok_or(error);
        }
        let now = format!("not all guards are installed yet: {error:#}");
        if now != reported {
            tracing::warn!("{now}");
            notifier.status(&now);
            reported = now;
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Keeper of the guards while no other program keeps them.
struct Keeper {
    config: Config,
    /// True once all guards were installed, by this program or by an agent.
    was_complete: bool,
    /// Guards that are kept. `None`: another program keeps them, or there is nothing to guard.
    held: Option<Held>,
}

/// Guards that are kept, with what is needed to repair them.
struct Held {
    network: HostNetwork,
    watch: Watch,
    plan: Plan,
    /// Networks around the machine when the plan was made.
    surroundings: Surroundings,
    /// Networks that are no networks of links.
    policy: CandidatePolicy,
    /// True if the machine's links, addresses or default routes changed since then.
    has_moved: bool,
    /// Versions of the files that the plan was made from.
    files: Files,
    /// True if state that Towline created was changed, or refused by the kernel, since the last
    /// apply.
    is_stale: bool,
    /// Set if the plan is not the whole one.
    fallback: Option<Fallback>,
    last: Guarded,
}

/// A plan without all that is stored.
struct Fallback {
    /// Why not all guards are installed, for status output.
    reason: String,
    /// Time of the next attempt to install all guards.
    retry_at: Instant,
}

impl Keeper {
    fn new(config: Config) -> Self {
        Self { config, was_complete: false, held: None }
    }

    /// Returns whether no guard was refused at the last check.
    fn is_whole(&self) -> bool {
        match self.held.as_ref().map(|held| &held.last) {
            Some(Guarded::Installed { is_whole, .. }) => *is_whole,
            _ => true,
        }
    }

    /// Restores what is missing, if no other program keeps the guards.
    fn check(&mut self) -> anyhow::Result<Guarded> {
        // The lock is held until the end of the function; an agent that starts waits for it.
        let state = match enter(&self.config)? {
            Ok(state) => state,
            Err(reason) => {
                self.held = None;
                self.was_complete |= reason == Guarded::AgentRuns;
                return Ok(reason);
            }
        };
        let files = Files::of(&self.config.state_dir);
        let now = Instant::now();
        let is_due = |fallback: &Fallback| now >= fallback.retry_at;
        let is_current =
            |held: &Held| held.files == files && !held.fallback.as_ref().is_some_and(is_due);
        let mut held = self.held.take().filter(is_current);
        if let Some(moved) = held.as_mut().filter(|held| held.has_moved) {
            moved.has_moved = false;
            let surroundings = Surroundings::read(&mut moved.network, &moved.policy)?;
            held = held.filter(|held| held.surroundings == surroundings);
        }
        let held = match held {
            Some(held) => held,
            None => Held::open(&self.config, &state, files, None)?,
        };
        let held = self.held.insert(held);
        held.install(&self.config)?;
        let (last, is_all) = (held.last.clone(), held.fallback.is_none());
        self.was_complete |= is_all && self.is_whole();
        Ok(last)
    }

    /// Returns what is to be reported after a check failed. Until all guards were installed once, those of the ranges
    /// are kept instead; after that, what is installed stays.
    fn fall_back(&mut self, error: &anyhow::Error) -> String {
        self.held = None;
        let ranges = (!self.was_complete).then(|| self.guard_ranges(error));
        match ranges {
            Some(Ok(guarded)) => guarded.to_string(),
            Some(Err(_)) | None => format!("cannot keep the guards: {error:#}"),
        }
    }

    /// Guards the ranges of the mesh and of static peers and what else can be read, if no other program keeps
    /// the guards. `error` says why not all guards are installed.
    fn guard_ranges(&mut self, error: &anyhow::Error) -> anyhow::Result<Guarded> {
        let state = match enter(&self.config)? {
            Ok(state) => state,
            Err(reason) => return Ok(reason),
        };
        let files = Files::of(&self.config.state_dir);
        let reason = format!("some may be missing: {error:#}");
        let fallback = Fallback { reason, retry_at: Instant::now() + RETRY_PERIOD };
        let mut held = Held::open(&self.config, &state, files, Some(fallback))?;
        held.install(&self.config)?;
        Ok(self.held.insert(held).last.clone())
    }

    /// Waits for a change or for the next periodic check.
    async fn changed(&mut self) {
        let tick = tokio::time::sleep(PERIOD);
        let Some(held) = &mut self.held else { return tick.await };
        let event = tokio::select! {
            () = tick => return,
            event = held.next_event() => event,
        };
        match event {
            Ok(HostEvent::OursChanged | HostEvent::HooksChanged) => {
                held.network.invalidate();
                held.is_stale = true;
            }
            Ok(HostEvent::AddressesChanged) => held.has_moved = true,
            Ok(HostEvent::FirewallsChanged) => {}
            // The next check opens it again.
            Err(_) => {
                self.held = None;
                tokio::time::sleep(PERIOD).await;
            }
        }
    }
}

impl Held {
    /// Waits for the next event. The agent alone looks for what other programs drop: a program that changes
    /// its nftables often causes no check.
    async fn next_event(&mut self) -> Result<HostEvent, NetlinkError> {
        loop {
            match self.watch.next().await {
                Ok(HostEvent::FirewallsChanged) => {}
                event => return event,
            }
        }
    }

    fn open(
        config: &Config,
        state: &StateDir,
        files: Files,
        fallback: Option<Fallback>,
    ) -> anyhow::Result<Self> {
        let extent = if fallback.is_some() { Extent::Ranges } else { Extent::Whole };
        let mut network = HostNetwork::open_unowned().context("cannot open a netlink socket")?;
        // Opened before the addresses are read, so that no change is missed.
        let watch = network.watch(&config.names()).context("cannot watch the host's network")?;
        let Prepared { plan, surroundings, policy } =
            Prepared::read(config, state, &mut network, extent)?;
        let plan = with_guarded(plan, &mut network)?;
        Ok(Self {
            network,
            watch,
            plan,
            surroundings,
            policy,
            has_moved: false,
            files,
            is_stale: true,
            fallback,
            last: Guarded::NotJoined,
        })
    }

    /// Applies the plan, if that is needed.
    fn install(&mut self, config: &Config) -> anyhow::Result<()> {
        if std::mem::take(&mut self.is_stale) {
            let applied = self.network.apply(&self.plan).context("not all guards are installed")?;
            // The link is missing until the agent creates it.
            self.is_stale = applied.problems.iter().any(|problem| {
                problem.is_worth_retrying() && !matches!(problem, Problem::LinkMissing(_))
            });
            self.last = outcome(config, &self.plan, &applied);
            if let (Some(fallback), Guarded::Installed { problems, .. }) =
                (&self.fallback, &mut self.last)
            {
                problems.insert(0, fallback.reason.clone());
            }
        }
        Ok(())
    }
}

/// Adds the networks that an agent guarded but could not store, for example on a full disk.
fn with_guarded(mut plan: Plan, network: &mut HostNetwork) -> anyhow::Result<Plan> {
    let found = network.guarded(&Names::of(&plan)).context("cannot read the routes")?;
    let local: Vec<IpNet> = plan.local.keys().copied().collect();
    for net in without(covering(found), &local) {
        if !plan.firewall.guarded.iter().any(|have| have.contains(&net)) {
            plan.firewall.guarded.insert(net);
            plan.routes.insert((net, RouteVia::Unreachable), RoutePlan::default());
        }
    }
    Ok(plan)
}

/// Inode and change time of each file that the plan is made from. The change time also shows new permissions.
#[derive(Debug, PartialEq, Eq)]
struct Files(Vec<Option<(u64, i64, i64)>>);

impl Files {
    fn of(directory: &Path) -> Self {
        let of = |name: &str| {
            let metadata = std::fs::metadata(directory.join(name)).ok()?;
            Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
        };
        Self(
            [
                "membership.json",
                "map.bin",
                "map.journal",
                "prefixes.json",
                "networks.json",
                "host.json",
            ]
            .map(of)
            .into(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host, leaves, state_of_a_node};
    use super::*;
    use towline_netlink::{AddressOptions, Family, Route, RouteKind, Rtnetlink};
    use towline_netns::{add_link, namespace_test};
    use towline_nftables::{Nft, Ownership, TableFamily};

    const OUR_TABLE: u32 = 21_580;

    fn run<T>(body: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body)
    }

    fn rules() -> usize {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let all = Family::ALL.map(|family| rtnetlink.rules(family).unwrap());
        all.iter().flatten().filter(|rule| rule.made_by == towline_host::OURS).count()
    }

    fn delete_rules() {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for family in Family::ALL {
            for rule in rtnetlink.rules(family).unwrap() {
                if rule.made_by == towline_host::OURS {
                    rtnetlink.delete_rule(&rule).unwrap();
                }
            }
        }
    }

    fn routes() -> usize {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        Family::ALL
            .map(|family| rtnetlink.routes(family, Some(OUR_TABLE)).unwrap().len())
            .iter()
            .sum()
    }

    fn delete_routes() {
        let mut rtnetlink = Rtnetlink::open().unwrap();
        for family in Family::ALL {
            for route in rtnetlink.routes(family, Some(OUR_TABLE)).unwrap() {
                rtnetlink.delete_route(&route).unwrap();
            }
        }
    }

    fn has_table() -> bool {
        Nft::open().unwrap().read(TableFamily::Inet, "towline").unwrap().is_some()
    }

    fn delete_table() {
        Nft::open().unwrap().delete(TableFamily::Inet, "towline").unwrap();
    }

    /// Runs the keeper until the host is as required.
    async fn until(keeper: &mut Keeper, what: &str, done: impl Fn() -> bool) {
        let work = async {
            while !done() {
                keeper.changed().await;
                keeper.check().unwrap();
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), work).await;
        ended.unwrap_or_else(|_| panic!("not repaired: {what}"));
    }

    fn keeper(directory: &Path) -> Keeper {
        let config = Config {
            state_dir: directory.join("state"),
            socket: directory.join("agent.sock"),
            ..Config::default()
        };
        state_of_a_node(&config.state_dir);
        Keeper::new(config)
    }

    namespace_test! {
        fn it_ends_well_where_nothing_is_to_be_guarded_and_badly_where_that_cannot_be_seen() {
            let dir = tempfile::tempdir().unwrap();
            let missing = Config { state_dir: dir.path().join("state"), ..Config::default() };
            watch(&missing).unwrap();
            assert!(!missing.state_dir.exists(), "nothing is created");
            let file = dir.path().join("file");
            std::fs::write(&file, "").unwrap();
            let unreadable = Config { state_dir: file, ..Config::default() };
            let error = format!("{:#}", watch_from(&unreadable, Duration::ZERO).unwrap_err());
            assert!(error.contains("membership.json"), "{error}");
        }
    }

    namespace_test! {
        fn a_map_that_can_be_read_is_guarded_though_another_file_cannot() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                let prefixes = keeper.config.state_dir.join("prefixes.json");
                std::fs::remove_file(&prefixes).unwrap();
                std::fs::create_dir(&prefixes).unwrap();
                let first = start(&mut keeper, &Notifier::default(), Duration::ZERO).await.unwrap();
                assert!(first.to_string().contains("prefixes.json"), "{first}");
                assert!(!leaves("172.20.0.1"), "node 2 announces it");
                assert!(!leaves("198.19.0.2") && !leaves("10.1.2.3"));
                assert!(leaves("203.0.113.1"));
            });
        }
    }

    namespace_test! {
        fn the_ranges_of_the_mesh_are_guarded_though_the_map_cannot_be_read() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                let map = keeper.config.state_dir.join("map.bin");
                let stored = std::fs::read(&map).unwrap();
                std::fs::remove_file(&map).unwrap();
                std::fs::create_dir(&map).unwrap();
                assert!(keeper.check().is_err());
                // The start tries again at least once before its time is over.
                let quiet = Notifier::default();
                let limit = Duration::from_millis(100);
                let first = start(&mut keeper, &quiet, limit).await.unwrap().to_string();
                assert!(first.contains("some may be missing"), "{first}");
                assert!(first.contains("map.bin"), "{first}");
                assert!(!leaves("198.19.0.2") && !leaves("10.1.2.3"));
                assert!(leaves("172.20.0.1"), "a network of a node is not known");

                // systemd-networkd does this when it starts.
                delete_rules();
                delete_routes();
                delete_table();
                assert!(leaves("198.19.0.2"));
                until(&mut keeper, "the ranges", || !leaves("198.19.0.2") && !leaves("10.1.2.3")).await;
                assert_eq!(keeper.check().unwrap().to_string(), first, "the rest is not tried yet");
                assert!(!keeper.was_complete);
                let held = keeper.held.as_mut().unwrap();
                held.fallback.as_mut().unwrap().retry_at = Instant::now();
                let error = keeper.check().err().unwrap();
                assert_eq!(keeper.fall_back(&error), first);
                assert!(!leaves("198.19.0.2") && !leaves("10.1.2.3"));

                std::fs::remove_dir(&map).unwrap();
                std::fs::write(&map, stored).unwrap();
                until(&mut keeper, "once it can be read", || !leaves("172.20.0.1")).await;
                assert!(!keeper.check().unwrap().to_string().contains("missing"));
            });
        }
    }

    namespace_test! {
        fn what_others_remove_is_restored_while_no_agent_runs() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                assert!(matches!(keeper.check().unwrap(), Guarded::Installed { is_whole: true, .. }));
                let (rules_before, routes_before) = (rules(), routes());
                assert!(rules_before > 0 && routes_before > 0 && has_table());
                for (what, act) in [
                    ("rules", delete_rules as fn()),
                    ("routes", delete_routes),
                    ("nftables", delete_table),
                    ("all of it", || { delete_rules(); delete_routes(); delete_table(); }),
                ] {
                    act();
                    until(&mut keeper, what, || {
                        rules() == rules_before && routes() == routes_before && has_table()
                    })
                    .await;
                    assert!(!leaves("198.19.0.2"), "{what}");
                }
            });
        }
    }

    namespace_test! {
        fn without_nftables_the_routes_alone_are_kept() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                let state = enter(&keeper.config).unwrap().unwrap();
                let files = Files::of(&keeper.config.state_dir);
                let mut held =
                    Held::open(&keeper.config, &state, files, None).unwrap();
                held.network.lack_nftables();
                keeper.held = Some(held);
                let Guarded::Installed { is_whole, problems, .. } = keeper.check().unwrap() else {
                    panic!("the guards are installed");
                };
                assert!(is_whole && problems[0].contains("nftables"), "{problems:?}");
                assert!(!leaves("198.19.0.2"));
                // systemd-networkd does this when it starts.
                delete_rules();
                delete_routes();
                assert!(leaves("198.19.0.2"));
                until(&mut keeper, "rules and routes", || !leaves("198.19.0.2")).await;
            });
        }
    }

    namespace_test! {
        fn nothing_is_restored_while_the_machine_is_down() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                keeper.check().unwrap();
                let marker = keeper.config.state_dir.join("down");
                std::fs::write(&marker, "").unwrap();
                delete_rules();
                delete_routes();
                delete_table();
                for _ in 0..2 {
                    keeper.changed().await;
                    assert_eq!(keeper.check().unwrap(), Guarded::Down);
                }
                assert!(rules() == 0 && routes() == 0 && !has_table() && leaves("198.19.0.2"));
                std::fs::remove_file(&marker).unwrap();
                until(&mut keeper, "after `up`", || !leaves("198.19.0.2")).await;
            });
        }
    }

    namespace_test! {
        fn an_agent_takes_over_and_what_it_guarded_is_kept_when_it_crashes() {
            let dir = tempfile::tempdir().unwrap();
            host();
            if let Err(error) = towline_dataplane::open_tun("towline0") {
                return println!("skipped: {error}");
            }
            run(async {
                let mut keeper = keeper(dir.path());
                keeper.check().unwrap();
                let plan = keeper.held.as_ref().unwrap().plan.clone();

                let state = StateDir::open(&keeper.config.state_dir).unwrap();
                let mut agent = HostNetwork::open().unwrap();
                let mut more = plan.clone();
                // The agent learned these networks and did not store them.
                let learned: ipnet::IpNet = "203.0.113.0/24".parse().unwrap();
                let learned_v6: ipnet::IpNet = "fd99::/64".parse().unwrap();
                for net in [learned, learned_v6] {
                    more.firewall.guarded.insert(net);
                    more.routes.insert((net, RouteVia::Unreachable), RoutePlan::default());
                }
                assert_eq!(agent.apply(&more).unwrap().problems, []);
                assert_eq!(keeper.check().unwrap(), Guarded::AgentRuns);
                // Repairing the rules is the running agent's task.
                delete_rules();
                keeper.changed().await;
                assert_eq!(keeper.check().unwrap(), Guarded::AgentRuns);
                assert_eq!(rules(), 0);
                agent.invalidate();
                agent.apply(&more).unwrap();

                // This is a crash of the agent.
                drop((agent, state));
                until(&mut keeper, "after the crash", || !leaves("203.0.113.9")).await;
                assert!(matches!(keeper.check().unwrap(), Guarded::Installed { .. }));
                delete_routes();
                delete_table();
                until(&mut keeper, "what was learned", || {
                    let found = Rtnetlink::open().unwrap().routes(Family::V4, Some(OUR_TABLE));
                    let guard = |route: &Route| {
                        route.destination == learned && route.kind == RouteKind::Unreachable
                    };
                    has_table() && found.unwrap().iter().any(guard)
                })
                .await;
                assert!(!leaves("203.0.113.9"));

                // The next agent can become the owner of the table.
                let _state = StateDir::open(&keeper.config.state_dir).unwrap();
                let mut agent = HostNetwork::open().unwrap();
                assert_eq!(agent.apply(&plan).unwrap().problems, []);
                let table = Nft::open().unwrap().read(TableFamily::Inet, "towline").unwrap().unwrap();
                assert_eq!(table.table.ownership == Ownership::Owner, agent.is_owner());
                assert_eq!(keeper.check().unwrap(), Guarded::AgentRuns);
            });
        }
    }

    namespace_test! {
        fn the_plan_follows_the_default_routes_to_other_links() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let mut keeper = keeper(dir.path());
                keeper.check().unwrap();
                let ways_out = |keeper: &Keeper| {
                    let held = keeper.held.as_ref().unwrap();
                    Vec::from_iter(held.surroundings.transit.ways_out.iter().cloned())
                };
                assert_eq!(ways_out(&keeper), ["eth0"]);
                let other = add_link("eth1");
                let mut rtnetlink = Rtnetlink::open().unwrap();
                let options = AddressOptions { no_dad: true, no_prefix_route: false };
                rtnetlink.add_address(other, "203.0.113.1/24".parse().unwrap(), options).unwrap();
                let gateway = "203.0.113.254".parse().unwrap();
                let default = Route::new("0.0.0.0/0".parse().unwrap()).via(gateway).dev(other);
                rtnetlink.add_route(&default.metric(100)).unwrap();
                let work = async {
                    while ways_out(&keeper) != ["eth0", "eth1"] {
                        keeper.changed().await;
                        keeper.check().unwrap();
                    }
                };
                let ended = tokio::time::timeout(Duration::from_secs(20), work).await;
                ended.expect("the default route is followed");
            });
        }
    }

    namespace_test! {
        fn a_machine_that_joins_while_it_watches_is_guarded() {
            let dir = tempfile::tempdir().unwrap();
            host();
            run(async {
                let config = Config {
                    state_dir: dir.path().join("state"),
                    socket: dir.path().join("agent.sock"),
                    ..Config::default()
                };
                let mut keeper = Keeper::new(config);
                assert_eq!(keeper.check().unwrap(), Guarded::NotJoined);
                state_of_a_node(&keeper.config.state_dir);
                until(&mut keeper, "after the join", || !leaves("198.19.0.2")).await;
                std::fs::remove_file(keeper.config.state_dir.join("membership.json")).unwrap();
                keeper.changed().await;
                assert_eq!(keeper.check().unwrap(), Guarded::NotJoined);
            });
        }
    }
}
