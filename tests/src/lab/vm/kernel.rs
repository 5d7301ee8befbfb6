//! Kernels of Debian's suites, unpacked without changing the host: the kernel, its modules as a
//! disk, and an initramfs whose first program mounts the disks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::cache::Cache;
use super::image::Image;
use super::tools::{KEYRING, output_of, tool};
use crate::lab::output::line;

/// A kernel release that machines can be booted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// Name of the release, for `--kernel`.
    pub name: &'static str,
    /// Debian suite that contains it.
    suite: &'static str,
}

/// All releases, oldest first. The cloud variant has the same sources and network options as the
/// generic kernel, and a third of its size.
pub const RELEASES: [Release; 4] = [
    Release { name: "5.10", suite: "bullseye" },
    Release { name: "6.1", suite: "bookworm" },
    Release { name: "6.12", suite: "trixie" },
    Release { name: "newest", suite: "trixie-backports" },
];
/// The release of the userland's suite, for cases that do not depend on the kernel.
pub const DEFAULT: Release = RELEASES[1];

const PACKAGE: &str = "linux-image-cloud-amd64";
const MIRROR: &str = "http://deb.debian.org/debian";
/// Modules that the first program loads, each after its dependencies.
const EARLY_MODULES: [&str; 6] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "ext4", "crc32c_generic"];
const INIT: &str = include_str!("guest/init");
/// Version of the code below, as a part of the cache's key. Increase it when the result changes.
const RECIPE: &str = "1";

/// A kernel that is ready to boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Release of the kernel.
    pub release: Release,
    /// Full version, such as `6.1.0-50-cloud-amd64`.
    pub version: String,
    /// Path of the kernel image, for QEMU's `-kernel`.
    pub image: PathBuf,
    /// Path of the initramfs, for QEMU's `-initrd`.
    pub initramfs: PathBuf,
    /// Path of the disk with the modules, an ext4 file system.
    pub modules: PathBuf,
}

impl Kernel {
    /// Returns the kernel from the cache, or downloads (20 to 50 MB) and unpacks it.
    pub fn get(cache: &Cache, image: &Image, release: Release) -> anyhow::Result<Self> {
        let busybox = fs::read(&image.busybox)?;
        let modules = EARLY_MODULES.join(" ");
        let made_from: [&[u8]; 6] = [
            RECIPE.as_bytes(),
            release.suite.as_bytes(),
            PACKAGE.as_bytes(),
            INIT.as_bytes(),
            modules.as_bytes(),
            &busybox,
        ];
        let kind = format!("kernel-{}", release.name);
        let place = cache.entry(&kind, &made_from, None, |place| {
            line(&format!("downloading kernel {} of Debian {}, once", release.name, release.suite));
            build(place, release, &busybox)
                .with_context(|| format!("cannot prepare kernel {}", release.name))
        })?;
        Ok(Self {
            release,
            version: fs::read_to_string(place.join("version"))?.trim().to_owned(),
            image: place.join("vmlinuz"),
            initramfs: place.join("initramfs"),
            modules: place.join("modules"),
        })
    }
}

fn build(place: &Path, release: Release, busybox: &[u8]) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    unpack(scratch.path(), &tree, release)?;
    // Newer packages have the modules below /usr.
    let modules = [tree.join("usr/lib/modules"), tree.join("lib/modules")]
        .into_iter()
        .find(|path| path.is_dir())
        .context("the package has no modules")?;
    let versioned = only_entry(&modules, "")?;
    // From 7.3 on, the kernel lies beside its modules.
    let image = match versioned.join("vmlinuz") {
        image if image.is_file() => image,
        _ => only_entry(&tree.join("boot"), "vmlinuz-")?,
    };
    fs::copy(&image, place.join("vmlinuz"))?;
    let version =
        versioned.file_name().context("the modules' path has no name")?.display().to_string();
    let root = scratch.path().join("root");
    fs::create_dir_all(root.join("lib/modules"))?;
    let versioned_in_root = root.join("lib/modules").join(&version);
    fs::rename(&versioned, &versioned_in_root)?;
    output_of(tool("depmod").arg("-b").arg(&root).arg(&version))?;
    fs::write(place.join("initramfs"), initramfs(&versioned_in_root, busybox)?)?;
    output_of(
        tool("mke2fs")
            .args(["-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d"])
            .arg(root.join("lib/modules"))
            .arg(place.join("modules"))
            .arg("400M"),
    )?;
    fs::write(place.join("version"), &version)?;
    Ok(())
}

/// Downloads the kernel's packages with a separate apt configuration and unpacks them into `tree`.
fn unpack(scratch: &Path, tree: &Path, release: Release) -> anyhow::Result<()> {
    let apt = Apt::new(&scratch.join("apt"), release.suite)?;
    let of_cpu = |name: &&String| name.starts_with("linux-") && name.contains("-cloud-");
    // The newest suites split a kernel into several packages.
    let mut wanted = BTreeSet::new();
    let mut open = vec![PACKAGE.to_owned()];
    while let Some(package) = open.pop() {
        let dependencies = apt.dependencies(&package)?;
        open.extend(
            dependencies.iter().filter(of_cpu).filter(|name| !wanted.contains(*name)).cloned(),
        );
        wanted.insert(package);
    }
    wanted.remove(PACKAGE);
    let fetched = scratch.join("fetched");
    fs::create_dir_all(&fetched)?;
    output_of(apt.command("apt-get").arg("download").args(&wanted).current_dir(&fetched))?;
    for package in fs::read_dir(&fetched)? {
        output_of(tool("dpkg-deb").arg("--extract").arg(package?.path()).arg(tree))?;
    }
    Ok(())
}

/// An apt configuration with one suite, independent of the host's packages.
struct Apt {
    config: PathBuf,
}

impl Apt {
    fn new(directory: &Path, suite: &str) -> anyhow::Result<Self> {
        for name in ["lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let at = |name: &str| directory.join(name).display().to_string();
        fs::write(at("status"), "")?;
        fs::write(at("sources"), format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"))?;
        let config = directory.join("apt.conf");
        let lines = [
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::SourceList", at("sources")),
            ("Dir::Etc::SourceParts", at("parts")),
            ("Dir::Etc::Parts", at("parts")),
            ("Acquire::Languages", "none".to_owned()),
            ("APT::Sandbox::User", "root".to_owned()),
            // Suites that are no longer updated have an expired date but are still signed.
            ("Acquire::Check-Valid-Until", "false".to_owned()),
        ];
        let text: String =
            lines.iter().map(|(name, value)| format!("{name} \"{value}\";\n")).collect();
        fs::write(&config, text)?;
        let apt = Self { config };
        output_of(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> std::process::Command {
        let mut command = tool(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }

    fn dependencies(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let shown =
            output_of(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(dependencies(&String::from_utf8_lossy(&shown)))
    }
}

/// Returns the package names in the `Depends` field of a package's description.
fn dependencies(description: &str) -> Vec<String> {
    let fields = description.lines().filter_map(|line| line.strip_prefix("Depends: "));
    fields
        .flat_map(|field| field.split([',', '|']))
        .filter_map(|dependency| dependency.split_whitespace().next().map(str::to_owned))
        .collect()
}

/// Returns the only entry of a directory whose name begins with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> anyhow::Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)
        .with_context(|| format!("the package has no {}", directory.display()))?
    {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([one]) => Ok(one),
        Err(found) => {
            bail!("{} has {} entries {prefix}* instead of one", directory.display(), found.len())
        }
    }
}

/// Returns the initramfs: the first program, and the modules in the order in which they are loaded.
fn initramfs(modules: &Path, busybox: &[u8]) -> anyhow::Result<Vec<u8>> {
    let listed = fs::read_to_string(modules.join("modules.dep"))?;
    let mut archive = Cpio::default();
    let mut order = String::new();
    for path in loading_order(&listed, &EARLY_MODULES) {
        let compressed = modules.join(&path);
        let bytes = match compressed.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => output_of(tool("xz").arg("-dc").arg(&compressed))?,
            Some("zst") => output_of(tool("zstd").arg("-dcq").arg(&compressed))?,
            _ => fs::read(&compressed)?,
        };
        ensure!(bytes.starts_with(b"\x7fELF"), "{path} is not a kernel module");
        let name = module_name(&path);
        archive.add(&format!("modules/{name}"), 0o100_644, &bytes);
        order.push_str(&name);
        order.push('\n');
    }
    archive.add("modules/order", 0o100_644, order.as_bytes());
    archive.add("init", 0o100_755, INIT.as_bytes());
    archive.add("bin/busybox", 0o100_755, busybox);
    Ok(archive.finish())
}

/// Returns the paths of the wanted modules and of their dependencies, dependencies first, from a
/// `modules.dep`. A module that is not listed is built in.
fn loading_order(listed: &str, wanted: &[&str]) -> Vec<String> {
    let mut known = BTreeMap::new();
    for line in listed.lines() {
        if let Some((path, needs)) = line.split_once(':') {
            known.insert(module_name(path), (path, needs));
        }
    }
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let Some((path, needs)) = known.get(*name) else { continue };
        // `modules.dep` lists all dependencies; the last one must be loaded first.
        for path in needs.split_whitespace().rev().chain([*path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    order
}

/// Returns a module's name: `virtio_pci` for `kernel/drivers/virtio/virtio_pci.ko.xz`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// A cpio archive (newc format), which the kernel unpacks as its initial root file system.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    fn add(&mut self, path: &str, mode: u32, bytes: &[u8]) {
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.entry(&path[..at], 0o040_755, &[]);
            }
        }
        self.entry(path, mode, bytes);
    }

    fn entry(&mut self, path: &str, mode: u32, bytes: &[u8]) {
        self.entries += 1;
        // ino, mode, uid, gid, nlink, mtime, size, 4 device numbers, name size, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(path.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let listed = "kernel/a/virtio.ko.xz:\n\
                      kernel/a/virtio-pci.ko.xz: kernel/a/ring.ko.xz kernel/a/virtio.ko.xz\n\
                      kernel/a/ring.ko.xz: kernel/a/virtio.ko.xz\n\
                      kernel/a/blk.ko.xz: kernel/a/ring.ko.xz kernel/a/virtio.ko.xz\n";
        let order = loading_order(listed, &["virtio_pci", "ext4", "blk"]);
        let names: Vec<String> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["virtio", "ring", "virtio_pci", "blk"]);
    }

    #[test]
    fn dependencies_are_read_from_a_description() {
        let description = "Package: x\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1), \
                           kmod | mod\nSize: 3\n";
        assert_eq!(dependencies(description), ["linux-image-6.1.0-50-cloud-amd64", "kmod", "mod"]);
    }

    #[test]
    fn a_cpio_archive_has_its_directories_and_is_padded() {
        let mut archive = Cpio::default();
        archive.add("modules/a", 0o100_644, b"12345");
        archive.add("modules/b", 0o100_644, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let names = bytes.windows(6).filter(|window| *window == b"070701").count();
        assert_eq!(names, 4, "a directory, two files and the trailer");
    }
}
