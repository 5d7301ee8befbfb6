//! `cargo lab package`: packs the static programs as a Debian package and as an OCI image without a
//! base, without a container engine or packaging tools, then reads both back. It also writes what the
//! programs are built of, and the checksums of all files, which a release signs.

pub(in crate::lab) mod archive;
mod reproducible;
mod sbom;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use ring::digest::{SHA256, digest};
use serde::Serialize;
use serde_json::{Value, json};
use towline_service::manual::{self, Shell};

use super::output::line;
use super::report::Figures;
use crate::checkout;
use archive::{Entry, ar, read_ar, read_tar, tar};

/// Results of `cargo lab package`.
#[derive(Debug, Default, Serialize)]
pub struct Package {
    /// Path of the Debian package.
    pub deb: PathBuf,
    /// Path of the image, an archive of an OCI layout.
    pub image: PathBuf,
    /// Target triple of the programs.
    pub target: String,
    /// Size of the Debian package in megabytes (10^6 bytes).
    pub deb_mb: f64,
    /// Size of the image in megabytes (10^6 bytes).
    pub image_mb: f64,
    /// Path of the software bill of materials (CycloneDX).
    pub sbom: PathBuf,
    /// Path of the SHA-256 checksums of the other files.
    pub sums: PathBuf,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
pub(in crate::lab) const PROGRAMS: [&str; 3] = ["towline", "towline-helper", "towline-controller"];

/// Command line options of `cargo lab package`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Output directory.
    #[arg(long, default_value = "target/package/out")]
    pub out: PathBuf,
    /// Directory of another build of the same sources, such as a release: the files must be the same.
    #[arg(long)]
    pub compare: Option<PathBuf>,
}

/// Builds the programs and both packages.
pub fn run(Options { out, compare }: &Options) -> anyhow::Result<Package> {
    let target = target();
    let programs = build(&target)?;
    let mut package = Package { target, ..Package::default() };
    for (name, bytes) in &programs {
        if !is_static(bytes) {
            package.failed.push(format!("{name} is static"));
        }
        if let Some(directory) = reproducible::named_directory(bytes, &directories()) {
            package.failed.push(format!("{name} does not name {directory}"));
        }
    }
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let deb = deb(&programs)?;
    let image = image(&programs)?;
    package.deb_mb = deb.len() as f64 / 1e6;
    package.image_mb = image.len() as f64 / 1e6;
    package.deb = out.join(format!("towline_{VERSION}_{}.deb", debian_architecture()));
    package.image = out.join(format!("towline-{VERSION}-oci.tar"));
    package.sbom = out.join(format!("towline-{VERSION}.cdx.json"));
    package.sums = out.join("SHA256SUMS");
    let sbom = sbom::document(&package.target)?;
    let sums = sums(&[(&package.deb, &deb), (&package.image, &image), (&package.sbom, &sbom)])?;
    let files = [
        (&package.deb, &deb),
        (&package.image, &image),
        (&package.sbom, &sbom),
        (&package.sums, &sums),
    ];
    for (path, bytes) in files {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        let Some(other) = compare else { continue };
        let other = other.join(path.file_name().context("a file has a name")?);
        if std::fs::read(&other).ok().as_ref() != Some(bytes) {
            package.failed.push(format!("{} is the same as {}", path.display(), other.display()));
        }
    }
    for (what, checked) in [("the package", check_deb(&deb)), ("the image", check_image(&image))] {
        if let Err(error) = checked {
            package.failed.push(format!("{what} reads back: {error:#}"));
        }
    }
    Ok(package)
}

/// Returns musl if its standard library is installed; otherwise glibc, which is linked statically.
fn target() -> String {
    let musl = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let asked = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", &musl])
        .stderr(Stdio::null())
        .output();
    let there = asked
        .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    if there { musl } else { format!("{}-unknown-linux-gnu", std::env::consts::ARCH) }
}

/// Returns the lines of `sha256sum` for files of one directory.
fn sums(files: &[(&PathBuf, &Vec<u8>)]) -> anyhow::Result<Vec<u8>> {
    let mut lines = Vec::new();
    for (path, bytes) in files {
        let name = path.file_name().and_then(|name| name.to_str()).context("a file has a name")?;
        let sum = sha256(bytes);
        lines.push(format!("{}  {name}\n", sum.strip_prefix("sha256:").unwrap_or(&sum)));
    }
    Ok(lines.concat().into_bytes())
}

/// Returns the directory of the build.
fn build_directory() -> PathBuf {
    let base = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    base.unwrap_or_else(|| checkout::root().join("target")).join("package")
}

/// Returns the directories of this machine whose names must not be in a program.
fn directories() -> Vec<reproducible::Directory> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    reproducible::directories(checkout::root(), home.as_deref(), &build_directory())
}

fn build(target: &str) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let root = checkout::root();
    let directory = build_directory();
    line(&format!("building the static programs for {target}"));
    let ended = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--locked", "-p", "towline-agent", "-p", "towline-helper"])
        .args(["-p", "towline-controller", "--target", target, "--target-dir"])
        .arg(&directory)
        .current_dir(root)
        .env("CARGO_ENCODED_RUSTFLAGS", reproducible::rustflags(&directories()))
        .env("SOURCE_DATE_EPOCH", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(ended.success(), "cannot build the programs: see the compiler's errors above");
    let release = directory.join(target).join("release");
    PROGRAMS
        .into_iter()
        .map(|name| {
            let path = release.join(name);
            let bytes = std::fs::read(&path);
            Ok((name.to_owned(), bytes.with_context(|| format!("no {}", path.display()))?))
        })
        .collect()
}

/// Returns whether an ELF file has no interpreter.
fn is_static(bytes: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, length: usize| -> Option<usize> {
        let field = bytes.get(at..at + length)?;
        Some(field.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let interprets = || -> Option<bool> {
        // ELF64, little-endian: e_phoff, e_phentsize, e_phnum.
        (bytes.get(..6)? == b"\x7fELF\x02\x01").then_some(())?;
        let (at, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut kinds = (0..count).filter_map(|index| number(at + index * size, 4));
        Some(kinds.any(|kind| kind == PT_INTERP as usize))
    };
    interprets() == Some(false)
}

fn debian_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Returns the programs as entries of both packages.
fn programs_in(programs: &BTreeMap<String, Vec<u8>>) -> Vec<Entry> {
    programs
        .iter()
        .map(|(name, bytes)| Entry::file(&format!("usr/bin/{name}"), 0o755, bytes.clone()))
        .collect()
}

fn deploy(name: &str) -> anyhow::Result<Vec<u8>> {
    let path = checkout::root().join("deploy").join(name);
    std::fs::read(&path).with_context(|| format!("no {}", path.display()))
}

const UNITS: [&str; 10] = [
    "towline.service",
    "towline-guard.service",
    "towline-helper.socket",
    "towline-helper@.service",
    "towline-controller.service",
    "towline-join.service",
    "towline-join.timer",
    "kubelet.service.d/10-towline.conf",
    "k3s-agent.service.d/10-towline.conf",
    "rke2-agent.service.d/10-towline.conf",
];

/// Declarations of system users and directories: the path below `usr/lib` and below
/// `deploy/systemd`.
const DECLARATIONS: [&str; 2] = ["sysusers.d/towline.conf", "tmpfiles.d/towline.conf"];

/// Script that creates the system users, with the first suitable program on the machine. It starts
/// nothing: a machine that has not joined has nothing to run.
const POSTINST: &str = r#"#!/bin/sh
set -e
systemd-sysusers towline.conf 2>/dev/null || true
for user in towline towline-controller; do
    grep -q "^$user:" /etc/passwd ||
        useradd --system --user-group --no-create-home --home-dir /nonexistent \
            --shell /usr/sbin/nologin "$user" 2>/dev/null ||
        adduser --system --group --no-create-home --home /nonexistent \
            --shell /usr/sbin/nologin "$user"
done
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemd-tmpfiles --create towline.conf || true
fi
"#;

/// Returns the Debian package with these programs, by name.
pub(in crate::lab) fn deb(programs: &BTreeMap<String, Vec<u8>>) -> anyhow::Result<Vec<u8>> {
    let mut files = programs_in(programs);
    for unit in UNITS {
        let place = format!("usr/lib/systemd/system/{unit}");
        files.push(Entry::file(&place, 0o644, deploy(&format!("systemd/{unit}"))?));
    }
    for name in DECLARATIONS {
        let place = format!("usr/lib/{name}");
        files.push(Entry::file(&place, 0o644, deploy(&format!("systemd/{name}"))?));
    }
    let networkd = "systemd/networkd.conf.d/10-towline.conf";
    files.push(Entry::file(&format!("usr/lib/{networkd}"), 0o644, deploy(networkd)?));
    for name in ["agent.toml", "controller.toml", "kubeadm.md", "k3s.md"] {
        files.push(Entry::file(&format!("usr/share/doc/towline/{name}"), 0o644, deploy(name)?));
    }
    files.push(Entry::file("usr/share/doc/towline/README.md", 0o644, deploy("../README.md")?));
    files.push(Entry::file("usr/share/doc/towline/copyright", 0o644, deploy("../LICENSE")?));
    files.extend(manuals()?);
    let kilobytes = files.iter().map(|file| file.bytes.len().div_ceil(1024)).sum::<usize>();
    let control = format!(
        "Package: towline\nVersion: {VERSION}\nArchitecture: {}\nMaintainer: Towline maintainers \
         <maintainers@towline.invalid>\nInstalled-Size: {kilobytes}\nSection: net\nPriority: \
         optional\nDescription: encrypted node network for hybrid Kubernetes\n Joins bare-metal \
         workers and cloud control-plane nodes into one network over\n userspace WireGuard.\n",
        debian_architecture()
    );
    let reload = "#!/bin/sh\nset -e\n[ ! -d /run/systemd/system ] || systemctl daemon-reload\n";
    let scripts = [
        Entry::file("control", 0o644, control.into()),
        Entry::file("postinst", 0o755, POSTINST.into()),
        Entry::file("postrm", 0o755, reload.into()),
    ];
    Ok(ar(&[
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", tar(&scripts)?),
        ("data.tar", tar(&files)?),
    ]))
}

/// Returns the man pages and shell completions of the programs that people call. They come from this
/// build of the programs' command lines, which is of the same sources as the programs.
fn manuals() -> anyhow::Result<Vec<Entry>> {
    let mut files = Vec::new();
    for command in [towline_agent::cli::command(), towline_controller::cli::command()] {
        for shell in Shell::ALL {
            let script = manual::completions(command.clone(), shell);
            files.push(Entry::file(&shell.path(command.get_name()), 0o644, script.into_bytes()));
        }
        for page in manual::pages(command)? {
            let path = format!("usr/share/man/man1/{}", page.file);
            files.push(Entry::file(&path, 0o644, page.text.into_bytes()));
        }
    }
    Ok(files)
}

fn image(programs: &BTreeMap<String, Vec<u8>>) -> anyhow::Result<Vec<u8>> {
    named_image(&format!("docker.io/library/towline:{VERSION}"), programs)
}

fn named_image(name: &str, programs: &BTreeMap<String, Vec<u8>>) -> anyhow::Result<Vec<u8>> {
    image_of(name, VERSION, &["/usr/bin/towline"], &programs_in(programs))
}

/// The image of the programs under its two names.
#[derive(Debug)]
pub(in crate::lab) struct Image {
    /// Archive in which the image has the name that the chart has by default.
    pub(in crate::lab) by_version: Vec<u8>,
    /// Archive in which the same image has the name [`Self::digest_name`].
    pub(in crate::lab) by_digest: Vec<u8>,
    /// `NAME@sha256:DIGEST`.
    pub(in crate::lab) digest_name: String,
}

/// Builds the static programs and their image.
pub(in crate::lab) fn build_image() -> anyhow::Result<Image> {
    let programs = build(&target())?;
    let by_version = image(&programs)?;
    let digest_name = format!("docker.io/library/towline@{}", digest_of(&by_version)?);
    let by_digest = named_image(&digest_name, &programs)?;
    Ok(Image { by_version, by_digest, digest_name })
}

/// Returns the digest of the image in an archive, which does not depend on its name.
fn digest_of(archive: &[u8]) -> anyhow::Result<String> {
    let files = read_tar(archive)?;
    let index = files.iter().find(|file| file.path == "index.json").context("no index.json")?;
    let index: Value = serde_json::from_slice(&index.bytes)?;
    let digest = index["manifests"][0]["digest"].as_str().context("no digest in the index")?;
    Ok(digest.to_owned())
}

/// Returns an archive of an OCI layout with one image of one layer, which has these files.
pub(in crate::lab) fn image_of(
    name: &str,
    reference: &str,
    entrypoint: &[&str],
    files: &[Entry],
) -> anyhow::Result<Vec<u8>> {
    let layer = tar(files)?;
    let architecture = debian_architecture();
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [sha256(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let described = |kind: &str, bytes: &[u8]| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": sha256(bytes),
            "size": bytes.len(),
        })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described("config.v1+json", &config),
        "layers": [described("layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut listed = described("manifest.v1+json", &manifest);
    listed["platform"] = json!({"architecture": architecture, "os": "linux"});
    listed["annotations"] = json!({
        "org.opencontainers.image.ref.name": reference,
        "io.containerd.image.name": name,
    });
    let index = json!({"schemaVersion": 2, "manifests": [listed]});
    let blob = |bytes: Vec<u8>| {
        Entry::file(&format!("blobs/{}", sha256(&bytes).replace(':', "/")), 0o644, bytes)
    };
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    tar(&[
        Entry::file("oci-layout", 0o644, layout.to_vec()),
        Entry::file("index.json", 0o644, index.to_string().into_bytes()),
        blob(manifest),
        blob(config),
        blob(layer),
    ])
}

fn sha256(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in digest(&SHA256, bytes).as_ref() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Unpacks a package and checks its contents; also with dpkg if it is installed.
fn check_deb(bytes: &[u8]) -> anyhow::Result<()> {
    let members = read_ar(bytes)?;
    let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == ["debian-binary", "control.tar", "data.tar"], "unexpected members: {names:?}");
    let files = read_tar(&members[2].1)?;
    for name in PROGRAMS {
        let path = format!("usr/bin/{name}");
        let found = files.iter().find(|file| file.path == path);
        ensure!(found.is_some_and(|file| file.mode == 0o755), "the program {path} is missing");
    }
    let units = UNITS.iter().map(|unit| format!("usr/lib/systemd/system/{unit}"));
    let declarations = DECLARATIONS.iter().map(|name| format!("usr/lib/{name}"));
    let manuals = [
        "usr/share/man/man1/towline.1",
        "usr/share/man/man1/towline-status.1",
        "usr/share/man/man1/towline-controller.1",
        "usr/share/man/man1/towline-controller-token-create.1",
        "usr/share/bash-completion/completions/towline",
        "usr/share/zsh/vendor-completions/_towline-controller",
        "usr/share/fish/vendor_completions.d/towline.fish",
    ];
    let manuals = manuals.map(ToOwned::to_owned);
    for path in units.chain(declarations).chain(manuals) {
        ensure!(files.iter().any(|file| file.path == path), "no {path}");
    }
    let scripts = read_tar(&members[1].1)?;
    let postinst = scripts.iter().find(|file| file.path == "postinst").context("no postinst")?;
    ensure!(postinst.mode == 0o755, "postinst is not executable");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), bytes)?;
    let Ok(output) = Command::new("dpkg-deb").arg("--contents").arg(file.path()).output() else {
        return Ok(());
    };
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "dpkg-deb cannot read the package: {}", words.trim());
    Ok(())
}

/// Follows an image from its index to its files and checks every digest.
fn check_image(bytes: &[u8]) -> anyhow::Result<()> {
    let files: BTreeMap<String, Vec<u8>> =
        read_tar(bytes)?.into_iter().map(|file| (file.path, file.bytes)).collect();
    let blob = |described: &Value| -> anyhow::Result<&Vec<u8>> {
        let name = described["digest"].as_str().context("a descriptor has no digest")?;
        let bytes = files.get(&format!("blobs/{}", name.replace(':', "/")));
        let bytes = bytes.with_context(|| format!("the blob {name} is missing"))?;
        ensure!(sha256(bytes) == name, "the digest of {name} is wrong");
        ensure!(described["size"] == bytes.len(), "the size of {name} is wrong");
        Ok(bytes)
    };
    let index: Value = serde_json::from_slice(files.get("index.json").context("no index.json")?)?;
    let manifest: Value = serde_json::from_slice(blob(&index["manifests"][0])?)?;
    let config: Value = serde_json::from_slice(blob(&manifest["config"])?)?;
    let layer = blob(&manifest["layers"][0])?;
    ensure!(config["rootfs"]["diff_ids"][0] == sha256(layer), "the digest of the layer is wrong");
    let found: Vec<String> = read_tar(layer)?.into_iter().map(|file| file.path).collect();
    for name in PROGRAMS {
        if !found.contains(&format!("usr/bin/{name}")) {
            bail!("{name} is missing in the layer");
        }
    }
    Ok(())
}

impl Figures for Package {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        format!(
            "{} ({:.1} MB)\n{} ({:.1} MB)\n{}\n{}\nbuilt for {}",
            self.deb.display(),
            self.deb_mb,
            self.image.display(),
            self.image_mb,
            self.sbom.display(),
            self.sums.display(),
            self.target
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> BTreeMap<String, Vec<u8>> {
        PROGRAMS.into_iter().map(|name| (name.to_owned(), name.as_bytes().to_vec())).collect()
    }

    #[test]
    fn a_package_reads_back_and_the_same_input_gives_the_same_bytes() {
        let made = deb(&programs()).unwrap();
        check_deb(&made).unwrap();
        assert_eq!(made, deb(&programs()).unwrap());
    }

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let (path, bytes) = (PathBuf::from("out/a.deb"), b"abc".to_vec());
        let lines = String::from_utf8(sums(&[(&path, &bytes)]).unwrap()).unwrap();
        let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(lines, format!("{sum}  a.deb\n"));
    }

    #[test]
    fn an_image_reads_back_and_a_changed_byte_is_found() {
        let mut made = image(&programs()).unwrap();
        check_image(&made).unwrap();
        let at = made.windows(7).rposition(|window| window == b"towline").unwrap();
        made[at] ^= 1;
        check_image(&made).unwrap_err();
    }

    #[test]
    fn the_digest_of_an_image_does_not_depend_on_its_name() {
        let digest = |name: &str| digest_of(&named_image(name, &programs()).unwrap()).unwrap();
        assert_eq!(digest("towline:1"), digest("towline@sha256:0"));
        assert!(digest("towline:1").starts_with("sha256:"));
    }

    #[test]
    fn the_running_test_asks_for_an_interpreter_and_no_elf_is_not_static() {
        assert!(!is_static(b"#!/bin/sh\n"));
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(is_static(&header));
        header[32] = 64;
        (header[54], header[56]) = (56, 1);
        header.extend(3_u32.to_le_bytes());
        assert!(!is_static(&header));
    }
}
