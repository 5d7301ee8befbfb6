//! Implements `towline netcheck`: what the network between this machine and the internet allows.

use std::io::IsTerminal as _;
use std::net::SocketAddr;

use anyhow::bail;
use clap::Args;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_service::color::{Color, Palette};
use towline_service::output::{self, Format};

use super::{Versioned, local};
use crate::config::Config;
use crate::netcheck::{
    AgentView, FamilyFindings, FamilyState, Nat, NatFiltering, NatMapping, Netcheck,
    ReflectorFindings, judge, probe,
};
use crate::state::StateDir;

#[derive(Debug, Args)]
pub(super) struct NetcheckArgs {
    /// STUN server to ask; may be repeated [default: those that the agent knows]
    #[arg(long, value_name = "ADDRESS:PORT")]
    reflector: Vec<SocketAddr>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Asks the STUN servers and prints the findings. Succeeds if one of them answered.
pub(super) fn run(config: &Config, args: NetcheckArgs) -> anyhow::Result<()> {
    // Without an agent, the rest is found out all the same.
    let status = local::status(&config.socket).ok();
    let reflectors = match args.reflector {
        given if !given.is_empty() => given,
        _ => known(config, status.as_ref()),
    };
    if reflectors.is_empty() {
        bail!(
            "no STUN server is known: no agent answers, or it was never connected to a controller: \
             give two with --reflector ADDRESS:PORT"
        );
    }
    if std::io::stderr().is_terminal() {
        eprintln!("asking the STUN servers, for at most 5 s");
    }
    let (ipv4, ipv6) = probe::observe(&reflectors, &config.link.name);
    let findings = judge(&ipv4, &ipv6, status.as_ref().map(agent_view));
    let report = Versioned::new(&findings);
    output::write(args.output, &report, |_| text(&findings, Palette::of_stdout()))?;
    if !findings.udp {
        bail!(
            "no STUN server answered over UDP: a firewall on the way drops UDP, or the servers are \
             down: allow outbound UDP, or ask others with --reflector"
        );
    }
    Ok(())
}

/// Returns the STUN servers that the agent knows, or those of the stored controllers.
fn known(config: &Config, status: Option<&pb::StatusResponse>) -> Vec<SocketAddr> {
    let of_agent = status.into_iter().flat_map(|status| &status.reflectors);
    let of_agent = of_agent.filter_map(|reflector| reflector.address.parse().ok());
    let found: Vec<SocketAddr> = of_agent.collect();
    if !found.is_empty() {
        return found;
    }
    // A controller's STUN server has the number of its TCP port. Names are not looked up.
    let membership = StateDir::peek(&config.state_dir).membership().ok().flatten();
    let stored = membership.map(|membership| membership.controllers).unwrap_or_default();
    stored.iter().filter_map(|controller| controller.as_str().parse().ok()).collect()
}

fn agent_view(status: &pb::StatusResponse) -> AgentView {
    let candidates = status.candidates.iter().filter_map(|one| Candidate::try_from(one).ok());
    AgentView {
        port: status.listen_port,
        second_port: status.second_port,
        mapping: (!status.nat_mapping.is_empty()).then(|| status.nat_mapping.clone()),
        candidates: candidates.map(|one| format!("{} ({})", one.address(), one.kind())).collect(),
    }
}

fn text(findings: &Netcheck, palette: Palette) -> String {
    let Netcheck { udp, ipv4, ipv6, agent } = findings;
    let mut lines = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    line(
        "udp",
        match udp {
            true => palette.paint(Some(Color::Green), "works"),
            false => palette.paint(Some(Color::Red), "no answer"),
        },
    );
    for (name, nat, family) in [("ipv4", "nat ipv4", ipv4), ("ipv6", "nat ipv6", ipv6)] {
        line(name, family_words(family));
        if family.state == FamilyState::Works {
            line(nat, nat_words(family.nat));
            line("", consequence(family.nat.mapping).to_owned());
        }
    }
    if let Some(agent) = agent {
        let second = agent.second_port.map(|port| format!(", second port {port}"));
        let second = second.unwrap_or_default();
        let mapping = output::or_dash(agent.mapping.as_ref());
        line("agent", format!("udp port {}{second}, mapping {mapping}", agent.port));
        for candidate in &agent.candidates {
            line("candidate", candidate.clone());
        }
    }
    let mut text = output::sheet(12, &lines);
    let reflectors: Vec<&ReflectorFindings> =
        ipv4.reflectors.iter().chain(&ipv6.reflectors).collect();
    if !reflectors.is_empty() {
        let rows = reflectors.into_iter().map(|reflector| {
            vec![
                reflector.address.to_string(),
                output::or_dash(reflector.mapped_address.map(|mapped| mapped.to_string())),
                output::or_dash(reflector.rtt_us.map(output::rtt)),
                mtu(reflector),
            ]
        });
        text += "\n";
        text += &output::table(&["STUN SERVER", "SEES", "RTT", "MTU"], rows);
    }
    text
}

fn family_words(family: &FamilyFindings) -> String {
    let address = output::or_dash(family.address.map(|address| address.to_string()));
    match (family.state, family.public_address) {
        (FamilyState::Works, Some(public)) => format!("{address} is seen as {public}"),
        (FamilyState::Works | FamilyState::NoAnswer, _) => {
            format!("{address} gets no answer from {} servers", family.reflectors.len())
        }
        (FamilyState::NotAsked, _) => {
            format!("{address}, but no STUN server with such an address is known")
        }
        (FamilyState::Absent, _) => "no address, or no route".to_owned(),
    }
}

/// Words for a mapping or filter of which only one remote address has shown something.
const ONE_ADDRESS: &str = "endpoint-independent or address-dependent (no second address answered)";

fn nat_words(nat: Nat) -> String {
    let mapping = match nat.mapping {
        NatMapping::None => {
            let filtering = filtering_words(nat);
            return format!(
                "none: the servers see the machine's own address; filtering {filtering}"
            );
        }
        NatMapping::EndpointIndependent => "endpoint-independent",
        NatMapping::AddressDependent => "address-dependent",
        NatMapping::AddressAndPortDependent => "address and port-dependent",
        NatMapping::Dependent => "address-dependent, perhaps port-dependent too",
        NatMapping::EndpointIndependentOrAddressDependent => ONE_ADDRESS,
        NatMapping::Unknown => "unknown (two servers with different addresses must answer)",
    };
    let word = |known: Option<bool>, yes, no| match known {
        Some(true) => yes,
        Some(false) => no,
        None => "unknown",
    };
    format!(
        "mapping {mapping}; source port {}; hairpinning {}; filtering {}",
        word(nat.preserves_port, "kept", "changed"),
        word(nat.hairpins, "yes", "no"),
        filtering_words(nat),
    )
}

fn filtering_words(nat: Nat) -> String {
    let filtering = match (nat.filtering, nat.filtering_reflector) {
        (NatFiltering::EndpointIndependent, _) => "endpoint-independent",
        (NatFiltering::AddressDependent, _) => "address-dependent",
        (NatFiltering::AddressAndPortDependent, _) => "address and port-dependent",
        (NatFiltering::EndpointIndependentOrAddressDependent, _) => ONE_ADDRESS,
        (NatFiltering::Unknown, None) => "unknown (no STUN server named a second port)",
        (NatFiltering::Unknown, Some(reflector)) => {
            return format!(
                "unknown (no answer shows that {reflector} sends from its second port)"
            );
        }
    };
    filtering.to_owned()
}

/// Returns what a mapping means for the paths to other nodes.
fn consequence(mapping: NatMapping) -> &'static str {
    match mapping {
        NatMapping::None => "other nodes reach this one unless a firewall drops their datagrams",
        NatMapping::EndpointIndependent => "direct paths can be opened to nodes behind most NATs",
        NatMapping::AddressDependent
        | NatMapping::AddressAndPortDependent
        | NatMapping::Dependent => {
            "direct paths only to nodes that can be reached from outside; others need a relay"
        }
        NatMapping::EndpointIndependentOrAddressDependent | NatMapping::Unknown => {
            "whether direct paths can be opened is not known"
        }
    }
}

fn mtu(reflector: &ReflectorFindings) -> String {
    match (reflector.mtu_at_least, reflector.mtu_at_most) {
        (Some(least), Some(most)) if u32::from(least) >= most => most.to_string(),
        (Some(least), Some(most)) => format!("{least} to {most}"),
        (Some(least), None) => format!("at least {least}"),
        (None, Some(most)) => format!("at most {most}"),
        (None, None) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::netcheck::{Asked, FilterTest, Observed, Passage};

    fn observed(answers: bool) -> Observed {
        let asked = |reflector: &str| Asked {
            reflector: reflector.parse().unwrap(),
            source: Some("192.168.1.7".parse().unwrap()),
            answer: answers
                .then(|| ("198.51.100.7:40000".parse().unwrap(), Duration::from_micros(420))),
            answered_packet: answers.then_some(1_420),
            route_mtu: Some(1_500),
        };
        Observed {
            own: vec!["192.168.1.7".parse().unwrap()],
            local_port: Some(40_000),
            asked: vec![asked("203.0.113.1:7443"), asked("203.0.113.2:7443")],
            came_back: Some(false),
            filter_test: None,
        }
    }

    #[test]
    fn the_findings_are_told_in_words() {
        let agent = AgentView {
            port: 51_830,
            second_port: None,
            mapping: Some("endpoint-independent".into()),
            candidates: vec!["198.51.100.7:51830 (reflexive)".into()],
        };
        let findings = judge(&observed(true), &Observed::default(), Some(agent));
        let text = text(&findings, Palette::PLAIN);
        for line in [
            "udp         works",
            "ipv4        192.168.1.7 is seen as 198.51.100.7:40000",
            "nat ipv4    mapping endpoint-independent; source port kept; hairpinning no; filtering unknown (no STUN server named a second port)",
            "            direct paths can be opened to nodes behind most NATs",
            "ipv6        no address, or no route",
            "agent       udp port 51830, mapping endpoint-independent",
            "candidate   198.51.100.7:51830 (reflexive)",
            "203.0.113.1:7443  198.51.100.7:40000  0.42 ms  1420 to 1500",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn the_words_about_the_filter_say_what_was_asked() {
        let reflector = "203.0.113.1:7443".parse().unwrap();
        for (other_port, other_address, words) in [
            (Passage::Passes, Some(Passage::Passes), "filtering endpoint-independent"),
            (Passage::Passes, Some(Passage::Dropped), "filtering address-dependent"),
            (Passage::Dropped, None, "filtering address and port-dependent"),
            (
                Passage::Passes,
                None,
                "filtering endpoint-independent or address-dependent (no second address answered)",
            ),
            (
                Passage::Passes,
                Some(Passage::Unproven),
                "filtering endpoint-independent or address-dependent (no second address answered)",
            ),
            (
                Passage::Unproven,
                None,
                "filtering unknown (no answer shows that 203.0.113.1:7443 sends from its second port)",
            ),
        ] {
            let test = FilterTest { reflector, other_port, other_address, mapped: Vec::new() };
            let observed = Observed { filter_test: Some(test), ..observed(true) };
            let text = text(&judge(&observed, &Observed::default(), None), Palette::PLAIN);
            let ending = format!("; {words}");
            assert!(text.lines().any(|line| line.ends_with(&ending)), "{words}\n{text}");
        }
    }

    #[test]
    fn silence_is_told_apart_from_a_missing_family() {
        let findings = judge(&observed(false), &Observed::default(), None);
        let text = text(&findings, Palette::PLAIN);
        assert!(text.starts_with("udp         no answer\n"), "{text}");
        assert!(text.contains("192.168.1.7 gets no answer from 2 servers"), "{text}");
        assert!(!text.contains("nat ipv4"), "{text}");
        assert!(text.contains("203.0.113.1:7443  -     -    at most 1500\n"), "{text}");
    }
}
