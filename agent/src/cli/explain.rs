//! Implements `towline explain PEER`: why a peer is down, relayed or slow, in words.

use anyhow::bail;
use clap::Args;
use towline_service::output::{self, Format};

use super::{Versioned, doctor, local};
use crate::config::Config;
use crate::control::unknown_node;
use crate::doctor::explain::{self, Explanation, Verdict};
use crate::doctor::{Agent, examine};

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Name of a node or of a static peer, or one of its overlay addresses
    peer: String,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Prints the explanation. Succeeds if this node knows the peer.
pub(super) fn run(config: &Config, args: &ExplainArgs) -> anyhow::Result<()> {
    let answers = local::ask(&config.socket)?;
    let facts = doctor::facts(config, Agent::Answered(Box::new(answers.clone())));
    let paths = local::paths(&config.socket, &args.peer);
    let explanation = explain::explain(&args.peer, &answers, &paths, &examine(&facts));
    let report = Versioned::new(&explanation);
    output::write(args.output, &report, |wide| text(&explanation, wide))?;
    if explanation.state == Verdict::Unknown {
        bail!("{}", unknown_node(&args.peer));
    }
    Ok(())
}

fn text(explanation: &Explanation, wide: bool) -> String {
    let mut text: String =
        explanation.sentences.iter().flat_map(|sentence| [sentence, "\n"]).collect();
    if let Some(remedy) = &explanation.remedy {
        text.push_str(&format!("what to do: {remedy}\n"));
    }
    if let Some(cause) = explanation.cause.as_ref().filter(|_| wide) {
        text.push_str(&format!("code: {cause}\n"));
    }
    text
}
