//! Command `towline-controller token`.

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use jiff::SignedDuration;
use serde::Serialize;
use std::collections::BTreeMap;
use towline_proto::id::Label;
use towline_proto::pod_range::PodRange;
use towline_proto::{convert, limits, pb};
use towline_service::output::{self, Format};

use super::client::{Client, status_error};
use super::{Common, examples, span};
use crate::clock;

#[derive(Debug, Subcommand)]
pub(super) enum Token {
    /// Create a join token; it is shown only once, as the only line on standard output
    #[command(after_help = examples::TOKEN_CREATE)]
    Create(Box<Create>),
    /// List the tokens, without their secrets
    #[command(after_help = examples::TOKEN_LIST)]
    List {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Revoke a token; nodes that joined with it stay in the mesh
    #[command(after_help = examples::TOKEN_REVOKE)]
    Revoke {
        /// Id of the token
        id: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Time for which the token is valid, for example `30m` or `7d`
    #[arg(long, default_value = "1h", value_name = "DURATION")]
    ttl: SignedDuration,
    /// Number of nodes that may join with the token
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// Names that the nodes may have: a DNS label in which `*` matches any characters
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,
    /// Site of the nodes; nodes of one site share a LAN
    #[arg(long)]
    site: Option<String>,
    /// Label of the nodes; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Network that the nodes may announce, whole or in part; may be repeated. With a group, all nodes whose
    /// tokens name the same group for it may announce it at the same time, such as two gateways of a LAN
    #[arg(long = "prefix", value_name = "CIDR[,shared=GROUP]", value_parser = granted_prefix)]
    prefixes: Vec<GrantedPrefix>,
    /// Pod network of the cluster; each node may announce a few blocks of it, those that it announces
    /// first; may be repeated, one for each family
    #[arg(long = "pod-range", value_name = "CIDR")]
    pod_ranges: Vec<IpNet>,
    /// Prefix length of a block; once, or once for each pod range; 24 for IPv4 and 64 for IPv6 if it is
    /// not given
    #[arg(long = "block-len", value_name = "LENGTH", requires = "pod_ranges")]
    block_lens: Vec<u32>,
    /// Number of blocks of a pod range that a node may announce at a time, at most 64; once, or once
    /// for each pod range; 1 if it is not given
    #[arg(long, value_name = "N", requires = "pod_ranges")]
    blocks: Vec<u32>,
    /// Name of a node that the joining machine replaces; it is removed at the join
    #[arg(long, value_name = "NAME")]
    replace: Option<String>,
    /// Remove the nodes once they are offline for longer than the lease (10 minutes unless it was changed)
    #[arg(long)]
    ephemeral: bool,
    /// Remove the nodes once they are offline for this time, `1m` to `30d`, instead of the lease; implies
    /// --ephemeral
    #[arg(long, value_name = "DURATION")]
    ephemeral_after: Option<SignedDuration>,
    /// Let the nodes be relays, for nodes that have no direct path
    #[arg(long)]
    relay: bool,
    /// The nodes are control-plane nodes of a Kubernetes cluster: other nodes may use their API servers
    #[arg(long)]
    control_plane: bool,
    /// Output format; `table` prints only the token
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(super) async fn run(command: Token, common: &Common) -> anyhow::Result<()> {
    match command {
        Token::Create(create) => {
            let output = create.output;
            let request = create.request()?;
            let mut client = common.connect().await?;
            let created =
                client.admin.create_token(request).await.map_err(status_error)?.into_inner();
            let info =
                created.info.context("invalid response from the controller: no token data")?;
            let expires = span(info.expires_at - clock::now().unix);
            eprintln!("token {} admits {} within {expires}", info.id, nodes(info.uses));
            let shown = Created { token: &created.token, info: View::from(info) };
            Ok(output::write(output, &shown, |_| created.token.clone())?)
        }
        Token::List { output } => {
            let tokens = list(&mut common.connect().await?).await?;
            let views: Vec<View> = tokens.into_iter().map(View::from).collect();
            Ok(output::write(output, &views, |wide| table(&views, wide))?)
        }
        Token::Revoke { id } => {
            let request = pb::RevokeTokenRequest { id: id.clone() };
            common.connect().await?.admin.revoke_token(request).await.map_err(status_error)?;
            eprintln!("token {id} revoked");
            Ok(())
        }
    }
}

async fn list(client: &mut Client) -> anyhow::Result<Vec<pb::Token>> {
    let mut tokens: Vec<pb::Token> = Vec::new();
    loop {
        let after = tokens.last().map(|token| token.id.clone()).unwrap_or_default();
        let request = pb::ListTokensRequest { after };
        let page = client.admin.list_tokens(request).await.map_err(status_error)?.into_inner();
        tokens.extend(page.tokens);
        if !page.more {
            return Ok(tokens);
        }
    }
}

impl Create {
    fn request(self) -> anyhow::Result<pb::CreateTokenRequest> {
        let ttl = std::time::Duration::try_from(self.ttl).unwrap_or_default();
        if ttl.as_secs() == 0 || ttl > limits::TOKEN_TTL {
            bail!("invalid --ttl: use one second to {} days", limits::TOKEN_TTL.as_secs() / 86_400);
        }
        let ephemeral_after = match self.ephemeral_after {
            None => None,
            Some(after) => {
                let (least, most) = limits::EPHEMERAL_AFTER;
                let after = std::time::Duration::try_from(after).unwrap_or_default();
                if after < least || after > most {
                    bail!(
                        "invalid --ephemeral-after: use one minute to {} days",
                        most.as_secs() / 86_400
                    );
                }
                Some(after)
            }
        };
        let labels = self.labels.iter().map(|label| {
            let (key, value) = label
                .split_once('=')
                .with_context(|| format!("`{label}` is not a label: use KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        });
        for GrantedPrefix { prefix, .. } in &self.prefixes {
            if prefix.trunc() != *prefix {
                bail!("prefix {prefix} has host bits set: use {}", prefix.trunc());
            }
        }
        let pod_ranges = pod_ranges(&self.pod_ranges, &self.block_lens, &self.blocks)?;
        Ok(pb::CreateTokenRequest {
            pod_ranges: pod_ranges.iter().map(Into::into).collect(),
            ttl_seconds: u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX),
            uses: self.uses,
            name_pattern: self.name.unwrap_or_default(),
            site: self.site.unwrap_or_default(),
            labels: labels.collect::<anyhow::Result<_>>()?,
            allowed_prefixes: self
                .prefixes
                .iter()
                .map(|granted| (&granted.prefix).into())
                .collect(),
            shared: self.prefixes.iter().filter_map(GrantedPrefix::shared).collect(),
            replace: self.replace.unwrap_or_default(),
            ephemeral: self.ephemeral || ephemeral_after.is_some(),
            ephemeral_after_seconds: convert::whole_seconds(ephemeral_after),
            relay: self.relay,
            control_plane: self.control_plane,
        })
    }
}

/// Value of `--prefix`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct GrantedPrefix {
    prefix: IpNet,
    group: Option<Label>,
}

impl GrantedPrefix {
    /// Returns the prefix with its group, if it has one.
    fn shared(&self) -> Option<pb::SharedPrefix> {
        let group = self.group.as_ref()?.to_string();
        Some(pb::SharedPrefix { prefix: Some((&self.prefix).into()), group })
    }
}

/// Parses the value of `--prefix`.
fn granted_prefix(text: &str) -> Result<GrantedPrefix, String> {
    let (prefix, group) = match text.split_once(',') {
        None => (text, None),
        Some((prefix, word)) => {
            let group = word.strip_prefix("shared=").ok_or("use CIDR or CIDR,shared=GROUP")?;
            (prefix, Some(group.parse::<Label>().map_err(|error| error.to_string())?))
        }
    };
    let prefix = prefix.parse::<IpNet>().map_err(|error| error.to_string())?;
    Ok(GrantedPrefix { prefix, group })
}

/// Combines the flags of each pod range.
fn pod_ranges(ranges: &[IpNet], lengths: &[u32], blocks: &[u32]) -> anyhow::Result<Vec<PodRange>> {
    for (flag, count) in [("--block-len", lengths.len()), ("--blocks", blocks.len())] {
        if count > 1 && count != ranges.len() {
            bail!(
                "{count} {flag} for {} --pod-range: give it once, or once for each",
                ranges.len()
            );
        }
    }
    // A flag that is given once applies to all pod ranges.
    let of = |list: &[u32], at: usize, default| {
        list.get(at).or_else(|| list.first()).copied().unwrap_or(default)
    };
    let range = |(at, range): (usize, &IpNet)| {
        let length = match range {
            IpNet::V4(_) => 24,
            IpNet::V6(_) => 64,
        };
        let (length, blocks) = (of(lengths, at, length), of(blocks, at, 1));
        PodRange::new(*range, length, blocks, Vec::new()).map_err(anyhow::Error::from)
    };
    ranges.iter().enumerate().map(range).collect()
}

#[derive(Serialize)]
struct Created<'a> {
    /// The complete token. It is shown only once.
    token: &'a str,
    #[serde(flatten)]
    info: View,
}

#[derive(Serialize)]
struct View {
    /// Id of the token, in 16 hexadecimal digits.
    id: String,
    /// `open`, `used`, `expired` or `revoked`.
    state: &'static str,
    /// Names that the nodes may have, a pattern; empty: any name.
    name: String,
    /// Site of the nodes; empty: none.
    site: String,
    /// Number of nodes that may join with it.
    uses: u32,
    /// Number of nodes that joined with it.
    used: u32,
    /// Time of its creation.
    created_at: Option<String>,
    /// Time from which it is void.
    expires_at: Option<String>,
    /// Labels of the nodes.
    labels: BTreeMap<String, String>,
    /// Networks that the nodes may announce, whole or in part.
    prefixes: Vec<String>,
    /// Networks of which each node may announce a few blocks, each with their number and length.
    pod_ranges: Vec<String>,
    /// Networks that all nodes of a group may announce at the same time, each as `CIDR,shared=GROUP`.
    shared_prefixes: Vec<String>,
    /// Name of the node that the joining machine replaces; empty: none.
    replace: String,
    /// True if the nodes are removed once they are offline for longer than `ephemeral_after_seconds`.
    ephemeral: bool,
    /// Time that the nodes may be offline if they are ephemeral; null: the mesh's lease.
    ephemeral_after_seconds: Option<u32>,
    /// True if the nodes may be relays; null: it was created before 0.2.0, and does not decide it.
    relay: Option<bool>,
    /// True if the nodes are control-plane nodes, whose API servers other nodes may use.
    control_plane: bool,
    /// Names of the nodes that joined with it.
    nodes: Vec<String>,
    #[serde(skip)]
    expires_in: i64,
}

impl From<pb::Token> for View {
    fn from(token: pb::Token) -> Self {
        let expires_in = token.expires_at - clock::now().unix;
        let state = if token.revoked {
            "revoked"
        } else if token.used >= token.uses {
            "used"
        } else if expires_in <= 0 {
            "expired"
        } else {
            "open"
        };
        let prefix = |prefix: &pb::Prefix| IpNet::try_from(prefix).map(|net| net.to_string());
        let pod_range =
            |range: &pb::PodRange| PodRange::try_from(range).map(|range| range.to_string()).ok();
        let shared = |shared: &pb::SharedPrefix| {
            Some(format!("{},shared={}", prefix(shared.prefix.as_ref()?).ok()?, shared.group))
        };
        Self {
            state,
            created_at: output::time(token.created_at),
            expires_at: output::time(token.expires_at),
            prefixes: token.allowed_prefixes.iter().filter_map(|p| prefix(p).ok()).collect(),
            pod_ranges: token.pod_ranges.iter().filter_map(pod_range).collect(),
            shared_prefixes: token.shared.iter().filter_map(shared).collect(),
            labels: token.labels.into_iter().collect(),
            id: token.id,
            name: token.name_pattern,
            site: token.site,
            uses: token.uses,
            used: token.used,
            replace: token.replace,
            ephemeral: token.ephemeral,
            ephemeral_after_seconds: Some(token.ephemeral_after_seconds)
                .filter(|after| *after != 0),
            relay: token.relay,
            control_plane: token.control_plane,
            nodes: token.nodes,
            expires_in,
        }
    }
}

impl View {
    /// Returns whether the nodes are removed when they are offline, and after which time if it is not the lease.
    fn ephemeral_text(&self) -> String {
        match self.ephemeral_after_seconds {
            Some(seconds) if self.ephemeral => format!("true ({})", span(i64::from(seconds))),
            _ => self.ephemeral.to_string(),
        }
    }

    /// Returns whether the nodes may be relays.
    fn relay_text(&self) -> &'static str {
        match self.relay {
            Some(true) => "true",
            Some(false) => "false",
            None => "undecided",
        }
    }
}

fn table(tokens: &[View], wide: bool) -> String {
    let mut header = vec!["ID", "STATE", "USED", "EXPIRES", "NAME", "SITE", "NODES"];
    if wide {
        header.extend([
            "PREFIXES",
            "POD RANGES",
            "REPLACE",
            "EPHEMERAL",
            "RELAY",
            "CONTROL PLANE",
            "LABELS",
        ]);
    }
    let or = |text: &str, or: &str| if text.is_empty() { or.to_owned() } else { text.to_owned() };
    let rows = tokens.iter().map(|token| {
        let expires = match token.state {
            "open" => format!("in {}", span(token.expires_in)),
            _ => "-".to_owned(),
        };
        let mut row = vec![
            token.id.clone(),
            token.state.to_owned(),
            format!("{}/{}", token.used, token.uses),
            expires,
            or(&token.name, "*"),
            or(&token.site, "-"),
            output::list(&token.nodes),
        ];
        if wide {
            let labels: Vec<String> =
                token.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            row.extend([
                output::list(&token.prefixes),
                output::list(&token.pod_ranges),
                or(&token.replace, "-"),
                token.ephemeral_text(),
                token.relay_text().to_owned(),
                token.control_plane.to_string(),
                output::list(&labels),
            ]);
        }
        row
    });
    output::table(&header, rows)
}

fn nodes(uses: u32) -> String {
    if uses == 1 { "one node".to_owned() } else { format!("{uses} nodes") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(ranges: &[&str], lengths: &[u32], blocks: &[u32]) -> anyhow::Result<Vec<String>> {
        let ranges: Vec<IpNet> = ranges.iter().map(|text| text.parse().unwrap()).collect();
        Ok(pod_ranges(&ranges, lengths, blocks)?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_prefix_may_be_shared_in_a_group() {
        let prefix: IpNet = "192.168.50.0/24".parse().unwrap();
        let alone = granted_prefix("192.168.50.0/24");
        assert_eq!(alone, Ok(GrantedPrefix { prefix, group: None }));
        let shared = granted_prefix("192.168.50.0/24,shared=lan-b");
        assert_eq!(shared, Ok(GrantedPrefix { prefix, group: "lan-b".parse().ok() }));
        for wrong in ["192.168.50.0/24,", "192.168.50.0/24,lan-b", "lan", "192.168.50.0/24,shared="]
        {
            assert!(granted_prefix(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_wide_table_shows_what_the_nodes_may_be() {
        let token = |id: &str, relay, ephemeral_after_seconds| {
            let id = id.to_owned();
            let ephemeral = ephemeral_after_seconds != 0;
            View::from(pb::Token {
                id,
                relay,
                ephemeral,
                ephemeral_after_seconds,
                ..Default::default()
            })
        };
        let tokens = [token("a", Some(true), 600), token("b", None, 0)];
        let text = table(&tokens, true);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("EPHEMERAL") && lines[0].contains("RELAY"), "{text}");
        assert!(lines[1].contains("true (10m)"), "{text}");
        assert!(lines[2].contains("undecided"), "{text}");
        assert!(!table(&tokens, false).contains("RELAY"), "{text}");
    }

    #[test]
    fn the_screen_in_the_guide_has_these_columns() {
        let guide = include_str!("../../../docs/guide.md");
        let text = table(&[], false);
        let header: Vec<&str> = text.split_whitespace().collect();
        let mut lines = guide.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(lines.any(|line| line == header), "{text}");
    }

    #[test]
    fn a_flag_that_is_given_once_applies_to_all_pod_ranges() {
        let both = ["10.244.0.0/16", "fd00:10:244::/56"];
        let default = texts(&both, &[], &[]).unwrap();
        assert_eq!(default, ["10.244.0.0/16 (1 of /24)", "fd00:10:244::/56 (1 of /64)"]);
        let each = texts(&both, &[25, 64], &[2]).unwrap();
        assert_eq!(each, ["10.244.0.0/16 (2 of /25)", "fd00:10:244::/56 (2 of /64)"]);
        let wrong = texts(&both, &[24], &[]).unwrap_err().to_string();
        assert!(wrong.contains("fd00:10:244::/56 cannot be /24"), "{wrong}");
        let many = texts(&both[..1], &[], &[1, 2]).unwrap_err().to_string();
        assert!(many.contains("2 --blocks for 1 --pod-range"), "{many}");
    }
}
