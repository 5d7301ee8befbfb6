//! Fills a machine with known secrets, and searches the archive for them in every form.

use std::io::Read as _;
use std::path::Path;

use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};
use flate2::read::GzDecoder;

use super::*;
use crate::config::Config;
use crate::state::StateDir;

const TOKEN: &str = "towline1.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4v";
const PRESHARED: [u8; 32] = *b"a pre-shared key for the bundle!";

/// Returns what is in an archive, uncompressed.
fn content(archive: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    GzDecoder::new(archive).read_to_end(&mut content).unwrap();
    content
}

/// Returns the files of an archive by name.
fn files(archive: &[u8]) -> BTreeMap<String, (u32, String)> {
    let content = content(archive);
    let mut reader = tar::Archive::new(content.as_slice());
    let files = reader.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        (name, (entry.header().mode().unwrap(), text))
    });
    files.collect()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Returns the machine's configuration, and its secrets as bytes.
fn machine(directory: &Path) -> (Config, Vec<Vec<u8>>) {
    let state_dir = directory.join("state");
    let keys = StateDir::open(&state_dir).unwrap().keys_or_generate().unwrap();
    let preshared_key_file = directory.join("office.psk");
    std::fs::write(&preshared_key_file, BASE64.encode(&PRESHARED)).unwrap();
    let text = format!(
        "state_dir = \"{}\"\n[[peer]]\npublic_key = \"{}\"\npreshared_key_file = \"{}\"\n",
        state_dir.display(),
        keys.wireguard.public(),
        preshared_key_file.display(),
    );
    let config = Config::parse(&text, Path::new("agent.toml")).unwrap();
    let pem = keys.identity.to_pem();
    let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let der = BASE64.decode(body.as_bytes()).unwrap();
    // An Ed25519 key in PKCS #8 begins with 16 bytes that are the same for all (RFC 8410).
    let seed = der[16..48].to_vec();
    let secrets = vec![keys.wireguard.secret().to_bytes().to_vec(), seed, der, PRESHARED.to_vec()];
    (config, secrets)
}

#[test]
fn no_secret_of_the_machine_is_in_the_archive() {
    let directory = tempfile::tempdir().unwrap();
    let (config, secrets) = machine(directory.path());
    let mut forms: Vec<Vec<u8>> = Vec::new();
    for secret in &secrets {
        forms.push(secret.clone());
        for encoding in [BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER, HEXUPPER] {
            forms.push(encoding.encode(secret).into_bytes());
        }
    }
    forms.push(TOKEN.as_bytes().to_vec());
    // As if something had leaked each of them. Raw bytes that are not UTF-8 cannot be in a text.
    let leaks = forms.iter().filter_map(|form| String::from_utf8(form.clone()).ok());
    let leaked: String = leaks.map(|form| format!("leaked {form} here\n")).collect();
    let pem = std::fs::read_to_string(config.state_dir.join("identity.key")).unwrap();
    let value = serde_json::json!({ "reason": format!("{leaked}{pem}") });
    let mut parts = vec![
        Part::new("leaked.txt", Ok(leaked.clone())),
        Part::json("leaked.json", &value),
        Part::new("missing.txt", Err(format!("cannot read it: {leaked}{pem}"))),
    ];
    // The raw form of the pre-shared key is text as well.
    let mut known = Secrets::of_machine(&config);
    known.add_text(std::str::from_utf8(&PRESHARED).unwrap());
    parts.extend(host::parts(&config));
    let archive = archive(parts, &known, SystemTime::now()).unwrap();
    let content = content(&archive);
    for form in &forms {
        let shown = String::from_utf8_lossy(form);
        assert!(!contains(&content, form), "{shown} is in the archive");
        assert!(!contains(&archive, form), "{shown} is in the archive");
    }
    for line in pem.lines().filter(|line| !line.starts_with("-----")) {
        assert!(!contains(&content, line.as_bytes()), "{line} is in the archive");
    }
    // What is no secret is there.
    let files = files(&archive);
    let (mode, text) = &files["towline-bundle/config.toml"];
    assert_eq!(*mode, 0o600);
    assert!(text.contains("office.psk"), "{text}");
    let (_, leaked) = &files["towline-bundle/leaked.txt"];
    assert!(leaked.contains("leaked [secret removed]"), "{leaked}");
    assert!(files["towline-bundle/manifest.json"].1.contains("missing.txt"));
    assert!(files["towline-bundle/host/links.txt"].1.contains(": lo "), "{files:?}");
}

#[test]
fn the_archive_is_bounded_and_says_what_was_cut() {
    let long = "é".repeat(PART_BYTES);
    let part = |place: usize| Part {
        keep: if place == 0 { Keep::End } else { Keep::Begin },
        ..Part::new(format!("{place}.txt"), Ok(format!("{long}x")))
    };
    let parts = (0..20).map(part).collect();
    let files = files(&archive(parts, &Secrets::default(), SystemTime::now()).unwrap());
    let sizes: usize = files.values().map(|(_, text)| text.len()).sum();
    assert!(sizes <= ALL_BYTES + 4_096, "{sizes}");
    assert!(files["towline-bundle/0.txt"].1.ends_with("éx"));
    assert!(files["towline-bundle/1.txt"].1.ends_with('é'));
    let manifest: serde_json::Value =
        serde_json::from_str(&files["towline-bundle/manifest.json"].1).unwrap();
    assert_eq!(manifest["cut"].as_array().unwrap().len(), 20);
}

#[test]
fn a_text_is_cut_between_characters() {
    for (keep, expected) in
        [(Keep::Begin, ["", "a", "a", "aé", "aéb"]), (Keep::End, ["", "b", "b", "éb", "aéb"])]
    {
        for (limit, expected) in expected.into_iter().enumerate() {
            assert_eq!(cut("aéb", limit, keep), expected, "{keep:?} {limit}");
        }
    }
}
