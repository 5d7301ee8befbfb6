//! Cause and command of each code, as `docs/troubleshooting.md` has them. The document is part of the
//! binary, so that the commands and the documentation never say different things.

/// Text of the document.
const DOCUMENT: &str = include_str!("../../../docs/troubleshooting.md");
/// Heading of the document after which every row of a table is about a code.
const HEADING: &str = "\n## By code\n";

/// Row of the document about one code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What the operator sees.
    pub symptom: &'static str,
    /// Why that is so.
    pub cause: &'static str,
    /// What to run, with commands in backticks.
    pub command: &'static str,
}

/// Returns the row about a code.
pub fn entry(code: &str) -> Option<Entry> {
    let (_, by_code) = DOCUMENT.split_once(HEADING)?;
    by_code.lines().find_map(|line| {
        let (found, rest) = line.strip_prefix("| `")?.split_once('`')?;
        // A note has words in the first cell.
        let (_, cells) = rest.split_once('|').filter(|_| found == code)?;
        let mut cells = cells.split('|').map(str::trim);
        Some(Entry { symptom: cells.next()?, cause: cells.next()?, command: cells.next()? })
    })
}

/// Message about a code, which has the form `what failed: why: what to do`, in its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// What failed and why. The whole message if it does not say what to do.
    pub finding: &'a str,
    /// What to do, with the names of this machine, such as ``run `ufw allow in on towline0` ``.
    pub remedy: Option<&'a str>,
}

impl<'a> Message<'a> {
    /// Takes a message about a code apart. What to do is a command, or contains the one of the document: a
    /// remedy beside the finding would repeat it.
    pub fn of(code: &str, text: &'a str) -> Self {
        let documented = entry(code).map_or("", |entry| entry.command);
        let is_remedy = |part: &str| {
            part.starts_with("run `") || commands(documented).any(|command| part.contains(command))
        };
        match text.rsplit_once(": ") {
            Some((finding, last)) if is_remedy(last) => Self { finding, remedy: Some(last) },
            _ => Self { finding: text, remedy: None },
        }
    }
}

/// Returns the commands of a text, which are in backticks.
pub(crate) fn commands(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns what to do about a code, for the operator who reads no message that says it.
pub fn remedy(code: &str) -> Option<String> {
    let command = entry(code)?.command;
    Some(if command.starts_with('`') { format!("run {command}") } else { command.to_owned() })
}

/// Replaces the placeholder `CONTROLLER` of a remedy by the address of a controller, which is `host:port`.
pub(crate) fn with_controller(remedy: &str, address: &str) -> String {
    let Some((host, port)) = address.rsplit_once(':') else { return remedy.to_owned() };
    // Only together with a port is an IPv6 address in brackets.
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    remedy
        .replace("CONTROLLER:7443", address)
        .replace("CONTROLLER 7443", &format!("{bare} {port}"))
        .replace("CONTROLLER", bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_agent_has_an_entry() {
        for code in crate::codes() {
            let entry = entry(code).unwrap_or_else(|| panic!("{code} is not in the document"));
            assert!(!entry.cause.is_empty() && entry.command.contains('`'), "{code}: {entry:?}");
        }
        assert_eq!(entry("no-such-code"), None);
        assert_eq!(remedy("peer-idle").as_deref(), Some("run `towline ping NAME`"));
    }

    #[test]
    fn a_message_is_separated_from_what_it_says_to_do() {
        fn parts<'a>(code: &str, text: &'a str) -> (&'a str, Option<&'a str>) {
            let Message { finding, remedy } = Message::of(code, text);
            (finding, remedy)
        }
        let drops = "ufw drops what arrives first at UDP port 7: chain INPUT of table ip filter";
        let text = format!("{drops}: run `ufw allow 7/udp`");
        let separated = (drops, Some("run `ufw allow 7/udp`"));
        assert_eq!(parts("firewall-closes-port", &text), separated);
        assert_eq!(parts("of-a-newer-agent", &text), separated);
        // The command of the document, in other words.
        let text =
            "no guard: no such file: load the module (`modprobe nf_tables`), or use another kernel";
        let remedy = "load the module (`modprobe nf_tables`), or use another kernel";
        let separated = ("no guard: no such file", Some(remedy));
        assert_eq!(parts("nftables-guard-missing", text), separated);
        assert_eq!(parts("link-missing", text), (text, None));
        assert_eq!(parts("link-missing", "the link is missing"), ("the link is missing", None));
    }

    #[test]
    fn the_controller_of_a_remedy_gets_its_address() {
        let remedy =
            "`nc -vz CONTROLLER 7443`, `s_client -connect CONTROLLER:7443`, `ping CONTROLLER`";
        assert_eq!(
            with_controller(remedy, "203.0.113.10:8443"),
            "`nc -vz 203.0.113.10 8443`, `s_client -connect 203.0.113.10:8443`, `ping 203.0.113.10`"
        );
        assert_eq!(
            with_controller(remedy, "[2001:db8::1]:7443"),
            "`nc -vz 2001:db8::1 7443`, `s_client -connect [2001:db8::1]:7443`, `ping 2001:db8::1`"
        );
        assert_eq!(with_controller(remedy, ""), remedy);
    }
}
