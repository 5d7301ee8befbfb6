//! Removes secrets from text: those of this machine, and what has the form of one.

use std::fmt;
use std::path::Path;

use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};
use towline_proto::token;
use towline_service::pem;
use zeroize::Zeroizing;

use crate::config::Config;
use crate::install;
use crate::join::TOKEN_VARIABLE;

/// Text that takes the place of a secret.
const REMOVED: &str = "[secret removed]";
/// Shortest text that counts as a secret, in bytes. A shorter one may be part of anything.
const LEAST_BYTES: usize = 16;
/// Longest file that is read for its secrets, in bytes.
const FILE_BYTES: u64 = 64 << 10;
/// Number of bytes of a private key, and of a pre-shared one.
const KEY_BYTES: usize = 32;
/// DER header of an octet string with a key.
const OCTET_STRING: [u8; 2] = [0x04, 0x20];
/// Words after which a secret stands: a token, the keys of WireGuard's configuration and interface, and
/// the credentials of HTTP.
const PREFIXES: [&str; 8] = [
    token::PREFIX,
    "private_key=",
    "preshared_key=",
    "PrivateKey = ",
    "PresharedKey = ",
    "PrivateKey=",
    "PresharedKey=",
    "Bearer ",
];

/// Secrets of this machine, in each form in which a text may contain them.
#[derive(Default)]
pub struct Secrets {
    forms: Vec<Zeroizing<String>>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({} hidden)", self.forms.len())
    }
}

impl Secrets {
    /// Reads the secrets that this user can read: the node's keys, pre-shared keys, join tokens.
    pub fn of_machine(config: &Config) -> Self {
        let mut secrets = Self::default();
        for name in ["identity.key", "wireguard.key"] {
            secrets.add_file(&config.state_dir.join(name));
        }
        for path in config.peers.iter().filter_map(|peer| peer.preshared_key_file.as_deref()) {
            secrets.add_file(path);
        }
        secrets.add_file(Path::new(install::TOKEN));
        if let Ok(token) = std::env::var(TOKEN_VARIABLE) {
            secrets.add_text(&Zeroizing::new(token));
        }
        secrets
    }

    /// Adds the content of a file. One that does not exist, cannot be read or is too long has none: it
    /// cannot be in the output of a program that reads it, either.
    fn add_file(&mut self, path: &Path) {
        let is_short = std::fs::metadata(path).is_ok_and(|found| found.len() <= FILE_BYTES);
        if let Some(Ok(text)) = is_short.then(|| std::fs::read_to_string(path)) {
            self.add_text(&Zeroizing::new(text));
        }
    }

    /// Adds a secret as it is written in its file: a PEM key, a key in base64, a token.
    pub fn add_text(&mut self, text: &str) {
        if let Some(der) = pem::read_private_key(text) {
            self.add_bytes(&der);
            let seeds = der.windows(OCTET_STRING.len() + KEY_BYTES);
            for seed in seeds.filter_map(|window| window.strip_prefix(&OCTET_STRING)) {
                self.add_bytes(seed);
            }
        }
        for line in text.lines().map(str::trim) {
            if let Ok(bytes) = BASE64.decode(line.as_bytes()).map(Zeroizing::new)
                && bytes.len() == KEY_BYTES
            {
                self.add_bytes(&bytes);
            }
            if !line.starts_with("-----") {
                self.add_form(Zeroizing::new(line.to_owned()));
            }
        }
    }

    /// Adds each text form of some bytes.
    fn add_bytes(&mut self, bytes: &[u8]) {
        for encoding in [&BASE64_NOPAD, &BASE64URL_NOPAD, &HEXLOWER, &HEXUPPER] {
            self.add_form(Zeroizing::new(encoding.encode(bytes)));
        }
    }

    fn add_form(&mut self, form: Zeroizing<String>) {
        if form.len() >= LEAST_BYTES && !self.forms.contains(&form) {
            self.forms.push(form);
            // A long form may contain a short one.
            self.forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
        }
    }

    /// Returns the text without secrets.
    pub fn redact(&self, text: &str) -> String {
        let mut text = without_private_keys(text);
        for form in &self.forms {
            if text.contains(form.as_str()) {
                text = text.replace(form.as_str(), REMOVED);
            }
        }
        for prefix in PREFIXES {
            text = without_words_after(&text, prefix);
        }
        text
    }
}

/// Removes what follows a prefix, up to a blank, a quotation mark or another sign that ends a value.
fn without_words_after(text: &str, prefix: &str) -> String {
    let mut redacted = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(prefix) {
        let is_end =
            |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '\\' | ',' | ';' | ')');
        let end = after.find(is_end).unwrap_or(after.len());
        redacted.push_str(before);
        redacted.push_str(prefix);
        // A text that was redacted already begins with the sign of that.
        if end > 0 && !after.starts_with(REMOVED) {
            redacted.push_str(REMOVED);
            rest = &after[end..];
        } else {
            rest = after;
        }
    }
    redacted + rest
}

/// Removes private keys in PEM, also one whose end is missing.
fn without_private_keys(text: &str) -> String {
    const BEGIN: &str = "-----BEGIN ";
    const END: &str = "-----END ";
    let mut redacted = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        redacted.push_str(before);
        let is_private =
            after.split("-----").next().is_some_and(|label| label.ends_with("PRIVATE KEY"));
        if !is_private {
            redacted.push_str(BEGIN);
            rest = after;
            continue;
        }
        redacted.push_str(REMOVED);
        let behind = after.split_once(END).and_then(|(_, label)| label.split_once("-----"));
        rest = behind.map_or("", |(_, behind)| behind);
    }
    redacted + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    #[test]
    fn a_key_is_removed_in_each_of_its_forms() {
        let mut secrets = Secrets::default();
        secrets.add_text(&format!("{KEY}\n"));
        let bytes = BASE64.decode(KEY.as_bytes()).unwrap();
        let forms = [
            KEY.to_owned(),
            HEXLOWER.encode(&bytes),
            HEXUPPER.encode(&bytes),
            BASE64URL_NOPAD.encode(&bytes),
        ];
        for form in forms {
            let text = secrets.redact(&format!("before {form} after"));
            assert!(text.starts_with("before [secret removed]"), "{text}");
            assert!(text.ends_with(" after") && !text.contains(&form[..40]), "{text}");
        }
        assert_eq!(format!("{secrets:?}"), "Secrets(4 hidden)");
    }

    #[test]
    fn what_looks_like_a_secret_is_removed_without_knowing_it() {
        let secrets = Secrets::default();
        for (text, expected) in [
            ("token towline1.abc-_9, next", "token towline1.[secret removed], next"),
            ("\"towline1.abc\"", "\"towline1.[secret removed]\""),
            ("PrivateKey = abc\nx", "PrivateKey = [secret removed]\nx"),
            ("preshared_key=00ff", "preshared_key=[secret removed]"),
            ("Bearer ey.J", "Bearer [secret removed]"),
            (
                "a -----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\nb",
                "a [secret removed]\nb",
            ),
            ("a -----BEGIN EC PRIVATE KEY-----\nx", "a [secret removed]"),
            ("-----BEGIN CERTIFICATE-----\nx", "-----BEGIN CERTIFICATE-----\nx"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(secrets.redact(text), expected);
            assert_eq!(secrets.redact(expected), expected);
        }
    }

    #[test]
    fn a_short_line_is_no_secret() {
        let mut secrets = Secrets::default();
        secrets.add_text("up\n");
        assert_eq!(secrets.redact("the peer is up"), "the peer is up");
    }
}
