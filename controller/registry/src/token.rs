//! Join tokens in the registry. Only a hash of the secret is known here.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use subtle::ConstantTimeEq;
use towline_types::id::{Label, NodeName, TokenId};
use towline_types::limits;
use towline_types::node::{RelayRole, SharedPrefix};
use towline_types::pod_range::PodRange;

use super::JoinError;

/// Hash of a token's secret. It is not printed: logs have nothing of a secret.
#[derive(Clone, Copy)]
pub struct SecretHash(pub [u8; 32]);

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(hidden)")
    }
}

impl PartialEq for SecretHash {
    /// Compares two hashes in constant time.
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SecretHash {}

/// Pattern of the names that a token admits: a DNS label in which `*` matches any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Returns whether the pattern matches a name.
    pub fn matches(&self, name: &NodeName) -> bool {
        let mut rest = name.as_str();
        let mut parts = self.0.split('*');
        // The first part is anchored at the start and the last one at the end. Each part between
        // matches at its first occurrence, which leaves the most text for the parts after it.
        let first = parts.next().unwrap_or("");
        let Some(after) = rest.strip_prefix(first) else { return false };
        rest = after;
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Error of parsing a [`NamePattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid name pattern: use 1 to 63 lower-case letters, digits, inner hyphens, and `*` for any characters"
)]
pub struct InvalidPattern;

impl FromStr for NamePattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let allowed =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'*';
        let good = !text.is_empty()
            && text.len() <= limits::NAME_BYTES
            && text.bytes().all(allowed)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if good { Ok(Self(text.to_owned())) } else { Err(InvalidPattern) }
    }
}

/// Terms of a token, which apply to the nodes that join with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTerms {
    /// Number of nodes that may join with the token; at least 1.
    pub uses: u32,
    /// Names that the nodes may have; `None` allows any name.
    pub name: Option<NamePattern>,
    /// Site of the nodes.
    pub site: Option<Label>,
    /// Labels of the nodes.
    pub labels: BTreeMap<Label, String>,
    /// Networks that the nodes may announce, whole or in part.
    pub allowed_prefixes: Vec<IpNet>,
    /// Networks of which each node may announce a few blocks; no block is pinned.
    pub pod_ranges: Vec<PodRange>,
    /// Those of `allowed_prefixes` that other nodes of a group may announce at the same time.
    pub shared: Vec<SharedPrefix>,
    /// Name of a node that the joining node replaces. Such a token has one use.
    pub replace: Option<NodeName>,
    /// True if the nodes are removed once they are offline for longer than [`Self::ephemeral_after`].
    pub ephemeral: bool,
    /// Time that ephemeral nodes may be offline, within [`limits::EPHEMERAL_AFTER`]; `None`: the lease.
    pub ephemeral_after: Option<Duration>,
    /// Whether the nodes may relay for others.
    pub relay: RelayRole,
    /// True if the nodes are control-plane nodes of a Kubernetes cluster, whose API servers others may use.
    pub control_plane: bool,
}

impl TokenTerms {
    /// Returns the terms of a token that one node of any name may use, and that allows no prefixes.
    pub fn once() -> Self {
        Self {
            uses: 1,
            name: None,
            site: None,
            labels: BTreeMap::new(),
            allowed_prefixes: Vec::new(),
            pod_ranges: Vec::new(),
            shared: Vec::new(),
            replace: None,
            ephemeral: false,
            ephemeral_after: None,
            relay: RelayRole::Denied,
            control_plane: false,
        }
    }
}

/// A join token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Id of the token.
    pub id: TokenId,
    /// Terms for the nodes that join with it.
    pub terms: TokenTerms,
    /// Time of creation, in seconds since 1970.
    pub created_at: i64,
    /// Time from which on it admits no node, in seconds since 1970.
    pub expires_at: i64,
    /// Number of nodes that have joined with it.
    pub used: u32,
    /// True once an operator revoked it, or a restored backup made it void.
    pub revoked: bool,
    /// Hash of its secret.
    pub secret_hash: SecretHash,
}

impl Token {
    /// Checks that another node of this name may join with the token.
    pub(super) fn admits(&self, name: &NodeName, now: i64) -> Result<(), JoinError> {
        let token = self.id;
        if self.used >= self.terms.uses {
            return Err(JoinError::TokenUsed { token });
        }
        if now >= self.expires_at {
            return Err(JoinError::TokenExpired { token });
        }
        match &self.terms.name {
            Some(pattern) if !pattern.matches(name) => {
                Err(JoinError::Name { name: name.clone(), pattern: pattern.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Returns whether another node can join with the token.
    pub fn is_open(&self, now: i64) -> bool {
        !self.revoked && self.used < self.terms.uses && now < self.expires_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        let matches = |pattern: &str, name: &str| {
            pattern.parse::<NamePattern>().unwrap().matches(&name.parse().unwrap())
        };
        for (pattern, name) in [
            ("worker-1", "worker-1"),
            ("worker-*", "worker-1"),
            ("*", "anything"),
            ("a*c", "abc"),
            ("a*c", "ac"),
            ("*-dc-*-x", "w-dc-a-dc-b-x"),
            ("a*b*b", "abb"),
            ("a**b", "a1b"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("worker-1", "worker-11"),
            ("worker-*", "master-1"),
            ("a*c", "abcd"),
            ("a*b*b", "ab"),
            ("ab*ba", "aba"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
        for bad in ["", "A*", "a.b", "-a", "a b"] {
            assert!(bad.parse::<NamePattern>().is_err(), "{bad:?}");
        }
    }
}
