//! Checks of what was read from the host itself.

use ipnet::IpNet;
use towline_proto::mtu::Mtu;
use towline_service::output;

use super::findings::Findings;
use super::host_facts::LinkFacts;
use super::{Cause, CheckState, Facts, Subject};

/// Difference that a clock may have, in seconds, before it counts as set back.
const CLOCK_TOLERANCE: i64 = 60;
/// Free space in bytes below which nothing can be stored any more: a cached map has up to some MiB.
const DISK_FULL: u64 = 1 << 20;
/// Free space in bytes below which the disk should be looked at.
const DISK_LOW: u64 = 16 << 20;
/// Bytes that the tunnel adds to a packet, with IPv6 outside.
const TUNNEL_BYTES: u32 = 80;
/// `rp_filter` that drops what arrives by another link than the route back.
const STRICT: u32 = 1;

/// Adds the findings about the host.
pub(super) fn examine(facts: &Facts, findings: &mut Findings) {
    clock(facts, findings);
    certificate(facts, findings);
    forwarding(facts, findings);
    reverse_path(facts, findings);
    conntrack(facts, findings);
    mtu(facts, findings);
    ipv6(facts, findings);
    disk(facts, findings);
}

fn clock(facts: &Facts, findings: &mut Findings) {
    let host = &facts.host;
    if let Some((start, _)) = host.certificate
        && host.now < start
    {
        let start = output::time(start).unwrap_or_default();
        let text = format!("the clock is wrong: the node's certificate is valid from {start} on");
        findings.cause(Subject::Clock, CheckState::Failed, Cause::ClockWrong, text);
    }
    if let Some(written) = host.last_written
        && written > host.now + CLOCK_TOLERANCE
    {
        let ahead = written - host.now;
        let text = format!("the clock was set back: a file was written {ahead} s after now");
        findings.cause(Subject::Clock, CheckState::Warning, Cause::ClockSetBack, text);
    }
    match host.is_clock_synchronized {
        Some(true) => findings.summary(Subject::Clock, "synchronized"),
        // Many virtual machines have the clock of their host, and nothing that synchronizes it.
        Some(false) => {
            let is_suspect = findings.worst(Subject::Clock) > Some(CheckState::Ok);
            let state = if is_suspect { CheckState::Failed } else { CheckState::Ok };
            let text = "the kernel knows no program that synchronizes the clock";
            findings.cause(Subject::Clock, state, Cause::ClockNotSynchronized, text);
        }
        None => findings.skip(Subject::Clock, "the kernel does not tell the state of its clock"),
    }
}

fn certificate(facts: &Facts, findings: &mut Findings) {
    let host = &facts.host;
    let reported = facts.answers().map(|answers| answers.status.certificate_expires_at);
    let end = host.certificate.map(|(_, end)| end).or(reported).filter(|end| *end != 0);
    let Some(end) = end else {
        let why = "there is no certificate, or it cannot be read: a node gets one when it joins";
        return findings.skip(Subject::Certificates, why);
    };
    let at = output::time(end).unwrap_or_default();
    if host.now >= end {
        let text = format!("the node's certificate expired at {at}");
        let cause = Cause::CertificateExpired;
        return findings.cause(Subject::Certificates, CheckState::Failed, cause, text);
    }
    // It is renewed after two thirds of its life.
    let life = host.certificate.map_or(0, |(start, end)| end - start);
    if end - host.now < life / 6 {
        let text = format!("the node's certificate expires at {at}, and was not renewed");
        let cause = Cause::CertificateExpiresSoon;
        findings.cause(Subject::Certificates, CheckState::Warning, cause, text);
    }
    findings.summary(Subject::Certificates, format!("valid until {at}"));
}

fn forwarding(facts: &Facts, findings: &mut Findings) {
    let pods = facts.answers().and_then(|answers| answers.status.kubernetes.as_ref());
    let pods = pods.into_iter().flat_map(|kubernetes| &kubernetes.pod_networks);
    let networks = pods
        .filter_map(|network| network.parse::<IpNet>().ok())
        .chain(facts.networks_behind.iter().copied())
        .filter(|network| network.prefix_len() < network.max_prefix_len());
    let mut is_needed = false;
    for network in networks {
        is_needed = true;
        let (forwards, setting) = match network {
            IpNet::V4(_) => (facts.host.forwards_ipv4, "net.ipv4.ip_forward"),
            IpNet::V6(_) => (facts.host.forwards_ipv6, "net.ipv6.conf.all.forwarding"),
        };
        if forwards == Some(false) {
            let text = format!("{network} is behind this node, but {setting} is 0");
            let cause = Cause::ForwardingOff;
            findings.cause(Subject::Forwarding, CheckState::Failed, cause, text);
        }
    }
    if is_needed {
        findings.summary(Subject::Forwarding, "on");
    } else {
        findings.skip(Subject::Forwarding, "not needed: no network is behind this node");
    }
}

fn reverse_path(facts: &Facts, findings: &mut Findings) {
    let Some(link) = own_link(facts) else {
        let why = format!("the link {} does not exist", facts.link);
        return findings.skip(Subject::ReversePath, why);
    };
    let Some(of_link) = link.reverse_path_filter else {
        return findings.skip(Subject::ReversePath, "the kernel does not tell it");
    };
    // The strict mode of other links is fine: their packets have a route back by them.
    if of_link.max(facts.host.reverse_path_filter.unwrap_or(0)) == STRICT {
        let text = format!(
            "rp_filter of {} is strict (1), which drops packets from the tunnel: it was set after \
             Towline set it to 2",
            link.name
        );
        findings.add(Subject::ReversePath, CheckState::Failed, "rp-filter-strict", text);
    }
    findings.summary(Subject::ReversePath, format!("not strict on {}", link.name));
}

fn conntrack(facts: &Facts, findings: &mut Findings) {
    let Some(table) = facts.host.conntrack else {
        return findings.skip(Subject::Conntrack, "the kernel tracks no connections");
    };
    let text = format!("{} of {} entries are used", table.count, table.max);
    if table.is_full() && !findings.has(Subject::Conntrack, "conntrack-full") {
        findings.add(Subject::Conntrack, CheckState::Failed, "conntrack-full", text.clone());
    }
    findings.summary(Subject::Conntrack, text);
}

fn mtu(facts: &Facts, findings: &mut Findings) {
    let Some(link) = own_link(facts) else {
        return findings.skip(Subject::Mtu, format!("the link {} does not exist", facts.link));
    };
    // The agent sets the MTU before it sets the link up: until then it is the kernel's default.
    if !link.is_up {
        return findings.skip(Subject::Mtu, format!("the link {} is not up", link.name));
    }
    for uplink in facts.host.links.iter().filter(|uplink| uplink.is_uplink) {
        let needed = link.mtu.saturating_add(TUNNEL_BYTES);
        if uplink.name == link.name || uplink.mtu >= needed {
            continue;
        }
        // The paths' MTU is measured, so that this is only worth a look below the smallest MTU of IPv6.
        let is_small = uplink.mtu < u32::from(Mtu::MIN) + TUNNEL_BYTES;
        let state = if is_small { CheckState::Warning } else { CheckState::Ok };
        let text = format!(
            "the uplink {} has an MTU of {}, and {} of {} needs {needed}: packets are made smaller for \
             each peer",
            uplink.name, uplink.mtu, link.name, link.mtu
        );
        findings.cause(Subject::Mtu, state, Cause::UplinkMtuSmall, text);
    }
    findings.summary(Subject::Mtu, format!("{} has {}", link.name, link.mtu));
}

fn ipv6(facts: &Facts, findings: &mut Findings) {
    let reported = ["ipv6-absent", "ipv6-disabled"];
    if reported.iter().any(|code| findings.has(Subject::Ipv6, code)) {
        return;
    }
    let disabled = own_link(facts).and_then(|link| link.is_ipv6_disabled) == Some(true);
    if !facts.host.has_ipv6 {
        let text = "the kernel runs without IPv6: the tunnel carries IPv4 only";
        findings.add(Subject::Ipv6, CheckState::Ok, "ipv6-absent", text);
    } else if disabled {
        let text = format!("{} accepts no IPv6 addresses: it carries IPv4 only", facts.link);
        findings.add(Subject::Ipv6, CheckState::Ok, "ipv6-disabled", text);
    } else {
        findings.summary(Subject::Ipv6, "available");
    }
}

fn disk(facts: &Facts, findings: &mut Findings) {
    let Some(disk) = facts.host.disk else {
        return findings
            .skip(Subject::Disk, "the state directory does not exist, or is not readable");
    };
    let free = output::bytes(disk.free_bytes);
    if disk.is_read_only {
        let text = "its file system is read-only: a renewed certificate or map would be lost";
        findings.cause(Subject::Disk, CheckState::Warning, Cause::DiskReadOnly, text);
    } else if disk.is_out_of_files || disk.free_bytes < DISK_LOW {
        let is_full = disk.is_out_of_files || disk.free_bytes < DISK_FULL;
        let state = if is_full { CheckState::Failed } else { CheckState::Warning };
        let files = if disk.is_out_of_files { ", and no file can be created" } else { "" };
        let text = format!("its file system has {free} left{files}");
        findings.cause(Subject::Disk, state, Cause::DiskFull, text);
    }
    findings.summary(Subject::Disk, format!("{free} free"));
}

/// Returns the facts about Towline's link.
fn own_link(facts: &Facts) -> Option<&LinkFacts> {
    facts.host.links.iter().find(|link| link.name == facts.link)
}
