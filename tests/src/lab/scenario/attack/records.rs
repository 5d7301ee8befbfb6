//! Attacks by statements: records of a member with a discovery client of its own, and settings of a
//! controller that is not honest.
//!
//! The member joins with a token of its own in each case, and is removed afterwards. What the victim
//! guards for it is bounded, and is released some minutes later.

use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_agent::keys::{Identity, Wireguard};
use towline_agent::state::Keys;
use towline_agent::{dial, join, tls};
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::token::JoinToken;
use towline_proto::{limits, pb};

use super::stage::{Condition, Stage};
use super::{Attacker, Case, Outcome};
use crate::lab::interrupt::wait_up_to;
use crate::lab::namespace::Namespace;

/// Limit for a statement to reach the victim and to appear in its status, on a slow machine.
const NOTICED: Duration = Duration::from_secs(60);
/// Number of times that a member changes all that it announces.
const CHANGES: u8 = 6;
/// Pod range that no other node uses.
const RANGE: [&str; 2] = ["--pod-range", "10.245.0.0/16"];

pub(super) fn cases() -> Vec<Case> {
    use Outcome::{Granted, Refused};
    let wide = ["--prefix", "10.0.0.0/8"];
    let many: Vec<String> =
        (0..=limits::GUARDED_PREFIXES).map(|host| format!("172.16.0.{host}/32")).collect();
    let of = |list: &[&str]| -> Vec<String> { list.iter().map(ToString::to_string).collect() };
    let part_of_pods = ["--pod-range", "10.9.0.0/16", "--block-len", "26"];
    let published = [
        ("own-block", &RANGE[..], of(&["10.245.1.0/24"]), Granted),
        ("second-block", &RANGE, of(&["10.245.1.0/24", "10.245.2.0/24"]), Refused),
        ("wider-than-a-block", &RANGE, of(&["10.245.2.0/23"]), Refused),
        ("outside-the-range", &RANGE, of(&["10.246.1.0/24"]), Refused),
        ("pods-of-the-victim", &wide, of(&["10.9.1.0/24"]), Refused),
        ("part-of-the-victims-pods", &part_of_pods, of(&["10.9.1.64/26"]), Refused),
        ("too-many", &["--prefix", "172.16.0.0/12"], many, Refused),
    ];
    let published = published.into_iter().map(|(name, flags, prefixes, expected)| {
        let flags: Vec<String> = of(flags);
        Case::new(format!("records/{name}"), Attacker::Member, expected, move |stage| {
            publish_once(stage, &flags, &prefixes)
        })
    });
    let covering = [
        ("gateway-of-the-victim", "192.168.77.0/25", "a gateway of this machine"),
        ("controller", "203.0.113.0/28", "the controller"),
    ];
    let covering = covering.into_iter().map(|(name, network, what)| {
        Case::new(format!("records/{name}"), Attacker::Member, Refused, move |stage| {
            cover(stage, network, what)
        })
    });
    let others = [
        Case::new("records/fresh-prefixes", Attacker::Member, Outcome::Held, fresh_prefixes),
        Case::new("settings/range-around-the-gateway", Attacker::Controller, Refused, |stage| {
            let words = "protected range 192.168.0.0/16 is not guarded on this machine";
            set(stage, ["--protected", "192.168.0.0/16"], words)
        }),
        Case::new("settings/bypass-when-down", Attacker::Controller, Refused, |stage| {
            set(stage, ["--bypass-when-down", "10.9.0.0/16"], "bypass_when_down is not applied")
        }),
        Case::new("settings/refused-grant", Attacker::Controller, Refused, |stage| {
            let flags = ["token", "create", "--prefix", "169.254.0.0/16"];
            let output = stage.mesh()?.controller().operator().command(&flags);
            Ok(if output?.status.success() { Granted } else { Refused })
        }),
    ];
    published.chain(covering).chain(others).collect()
}

/// Name of the member that attacks.
pub(super) const NAME: &str = "intruder";

/// Publishes a record with these prefixes. It is granted if the controller withholds none of them.
fn publish_once(
    stage: &mut Stage<'_>,
    flags: &[String],
    prefixes: &[String],
) -> anyhow::Result<Outcome> {
    as_member(stage, flags, |token| async move {
        let mut member = Publisher::join(&token).await?;
        anyhow::Ok(match member.publish(&networks(prefixes)?).await {
            Ok(response) if response.refused.is_empty() => Outcome::Granted,
            Ok(_) | Err(_) => Outcome::Refused,
        })
    })
}

/// Announces a network that covers what the victim needs. `what` names it in the victim's status.
fn cover(stage: &mut Stage<'_>, network: &'static str, what: &str) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    let flags = ["--prefix".to_owned(), network.to_owned()];
    joined(stage, &flags, |stage, token| {
        let token = &token;
        act(stage.hosts.evil.namespace(), move || async move {
            let network: IpNet = network.parse()?;
            Publisher::join(token).await?.publish(&[network]).await?;
            anyhow::Ok(())
        })?;
        let refused = format!("prefix {network} is refused here");
        let is_refused = is_said(stage, &[&refused, what])? && !guarded(stage)?.contains(network);
        Ok(if is_refused { Outcome::Refused } else { Outcome::Granted })
    })
}

/// Announces other networks all the time. It is held if the victim guards no more than a node may have.
fn fresh_prefixes(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    let flags = ["--prefix".to_owned(), "172.16.0.0/12".to_owned()];
    joined(stage, &flags, |stage, token| {
        let last = format!("172.16.{CHANGES}.1/32");
        let token = &token;
        act(stage.hosts.evil.namespace(), move || async move {
            let mut member = Publisher::join(token).await?;
            for change in 1..=CHANGES {
                let fresh = (1..=60).map(|host| format!("172.16.{change}.{host}/32"));
                member.publish(&networks(&fresh.collect::<Vec<_>>())?).await?;
                // Each change is one of the map, which watchers get.
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            anyhow::Ok(())
        })?;
        let came = wait_up_to(NOTICED, || Ok(guarded(stage)?.contains(&last).then_some(())))?;
        anyhow::ensure!(came.is_some(), "the record did not reach the victim");
        let held = guarded(stage)?.matches("\"172.16.").count();
        let is_bounded = held <= limits::GUARDED_PREFIXES;
        Ok(if is_bounded { Outcome::Held } else { Outcome::Granted })
    })
}

/// Changes the mesh's configuration, as a controller may at any time. It is refused if a status says so
/// with these words.
fn set(stage: &mut Stage<'_>, [flag, value]: [&str; 2], words: &str) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    let change = |stage: &mut Stage<'_>, value: &str| {
        stage.mesh()?.controller().operator().command_ok(&["mesh", "set", flag, value]).map(drop)
    };
    change(stage, value)?;
    let is_said = is_said(stage, &[words]);
    change(stage, "none")?;
    Ok(if is_said? { Outcome::Refused } else { Outcome::Granted })
}

/// Runs an attempt as a member with its own token.
fn as_member<F>(
    stage: &mut Stage<'_>,
    flags: &[String],
    attempt: impl FnOnce(JoinToken) -> F + Send,
) -> anyhow::Result<Outcome>
where
    F: Future<Output = anyhow::Result<Outcome>>,
{
    joined(stage, flags, |stage, token| act(stage.hosts.evil.namespace(), || attempt(token)))
}

/// Joins a member that announces nothing, and leaves it in the mesh without a session.
pub(super) fn join_as_member(stage: &Stage<'_>, token: &JoinToken) -> anyhow::Result<()> {
    act(stage.hosts.evil.namespace(), move || async move {
        Publisher::join(token).await?.publish(&[]).await?;
        anyhow::Ok(())
    })
}

/// Runs an attempt with a token with these flags, and removes the node that joined with it.
pub(super) fn joined<'s>(
    stage: &mut Stage<'s>,
    flags: &[String],
    attempt: impl FnOnce(&mut Stage<'s>, JoinToken) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Outcome> {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let flags = [&["--name", NAME][..], &flags].concat();
    let token = stage.mesh()?.controller().operator().token_with(&flags)?;
    let outcome = attempt(stage, token.token.parse()?);
    // The attempt may have failed before there was a node.
    stage.mesh()?.controller().operator().command(&["node", "remove", NAME])?;
    outcome
}

/// Runs a job inside a namespace.
fn act<T: Send, F: Future<Output = anyhow::Result<T>>>(
    namespace: &Namespace,
    job: impl FnOnce() -> F + Send,
) -> anyhow::Result<T> {
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(job())
    })
}

/// Waits until a problem or a note in the status of the victim has all of these words.
fn is_said(stage: &mut Stage<'_>, words: &[&str]) -> anyhow::Result<bool> {
    let victim = &stage.mesh()?.a;
    let found = wait_up_to(NOTICED, || {
        let status = victim.status()?;
        let mut lines = status.problems.iter().chain(&status.notes);
        Ok(lines.any(|line| words.iter().all(|word| line.contains(word))).then_some(()))
    })?;
    Ok(found.is_some())
}

/// Returns what the victim guards, in JSON.
fn guarded(stage: &mut Stage<'_>) -> anyhow::Result<String> {
    stage.mesh()?.a.command_ok(&["guard", "list", "-o", "json"])
}

fn networks(list: &[String]) -> anyhow::Result<Vec<IpNet>> {
    list.iter().map(|text| Ok(text.parse()?)).collect()
}

/// A member with a discovery client of its own, which publishes any record.
struct Publisher {
    keys: Keys,
    grant: pb::Grant,
    client: DiscoveryClient<Channel>,
    session: Vec<u8>,
    generation: u64,
    /// Both ends of the watch. The session ends with them.
    _watch: (mpsc::Sender<pb::WatchRequest>, Streaming<pb::WatchResponse>),
}

impl Publisher {
    /// Joins with a token, and opens a session.
    async fn join(token: &JoinToken) -> anyhow::Result<Self> {
        let keys = Keys { identity: Identity::generate()?, wireguard: Wireguard::generate()? };
        let address = token.controllers.first().context("the token has no controller")?;
        let joining = dial::dial(address, tls::joining(token.ca)?.into(), 0).await?;
        let ca = tls::pinned_ca(&joining.chain, token.ca).context("another CA answered")?;
        let mut client = join::client(joining.channel);
        let hello = client.hello(pb::HelloRequest {}).await?.into_inner();
        let request = join::request(token, &NAME.parse()?, &keys, &hello)?;
        let answer = client.join(request).await?.into_inner();
        let grant = pb::Grant::decode(answer.grant.context("no grant")?.body)?;
        let chain: Vec<CertificateDer<'static>> =
            answer.certificate_chain.into_iter().map(Into::into).collect();

        let config = tls::member(&ca, Some((&chain, &keys.identity)))?;
        let connection = dial::dial(address, config.into(), 0).await?;
        let mut client = join::client(connection.channel);
        let (requests, outgoing) = mpsc::channel(4);
        let start = pb::WatchStart { instance_id: vec![1; 16], ..Default::default() };
        let kind = Some(pb::watch_request::Kind::Start(start));
        requests.send(pb::WatchRequest { kind }).await?;
        let mut responses = client.watch(ReceiverStream::new(outgoing)).await?.into_inner();
        let first = responses.message().await?.and_then(|first| first.kind);
        let Some(pb::watch_response::Kind::Ready(ready)) = first else {
            anyhow::bail!("the watch did not start")
        };
        let (session, watch) = (ready.session_id, (requests, responses));
        Ok(Self { keys, grant, client, session, generation: 0, _watch: watch })
    }

    /// Publishes a record with these prefixes, all of them networks of machines.
    async fn publish(&mut self, prefixes: &[IpNet]) -> Result<pb::PublishResponse, tonic::Status> {
        self.generation += 1;
        let prefixes: Vec<pb::Prefix> = prefixes.iter().map(Into::into).collect();
        let record = pb::Record {
            node_id: self.grant.node_id.clone(),
            generation: self.generation,
            boot_epoch: 1,
            wireguard_keys: self.grant.wireguard_keys.clone(),
            lans: prefixes.clone(),
            prefixes,
            ..Default::default()
        };
        let record = Some(self.keys.identity.sign_record(&record));
        let session_id = self.session.clone();
        let request = pb::PublishRequest { record, session_id };
        self.client.publish(request).await.map(tonic::Response::into_inner)
    }
}
