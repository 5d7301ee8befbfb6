//! The disk image that every machine starts from: Debian with systemd and the lab's two guest
//! programs. It does not contain Towline.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::Context as _;

use super::cache::{Cache, copy_sparse};
use super::tools::{output_of, tool};
use crate::lab::output::line;
use crate::lab::package::archive::{Entry, tar};

/// Debian suite of the userland, for every kernel.
const SUITE: &str = "bookworm";
/// Packages that are installed in addition to the essential ones.
const PACKAGES: [&str; 16] = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "iproute2",
    "nftables",
    "iputils-ping",
    "procps",
    "wireguard-tools",
    "busybox-static",
    "network-manager",
    "netplan.io",
    "ufw",
    "firewalld",
    "etcd-server",
];
/// Files to install: path in the machine, mode and contents.
const FILES: [(&str, u32, &str); 7] = [
    ("usr/local/lib/lab/runner", 0o755, include_str!("guest/runner")),
    ("etc/systemd/system/lab-runner.service", 0o644, include_str!("guest/lab-runner.service")),
    ("usr/local/lib/lab/background-traffic", 0o755, include_str!("guest/background-traffic")),
    (
        "etc/systemd/system/background-traffic.service",
        0o644,
        include_str!("guest/background-traffic.service"),
    ),
    ("etc/lab/targets", 0o644, "# LABEL ADDRESS\n"),
    (
        "etc/systemd/system/systemd-udev-trigger.service.d/lab.conf",
        0o644,
        include_str!("guest/udev-trigger.conf"),
    ),
    ("etc/systemd/system/service.d/lab.conf", 0o644, include_str!("guest/start-limit.conf")),
];
const ENABLED: &str = "lab-runner background-traffic systemd-networkd";
/// Units that only the cases start that are about them.
const DISABLED: &str = "NetworkManager NetworkManager-wait-online firewalld ufw wpa_supplicant \
    netplan-ovs-cleanup ModemManager polkit etcd";
/// Units that a machine does not need: each costs an emulated machine up to a second of its boot.
const MASKED: &str = "getty@.service serial-getty@.service systemd-logind.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-user-sessions.service modprobe@drm.service modprobe@efi_pstore.service \
    modprobe@dm_mod.service modprobe@loop.service modprobe@fuse.service modprobe@configfs.service \
    dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount sys-kernel-config.mount \
    sys-kernel-debug.mount sys-kernel-tracing.mount proc-sys-fs-binfmt_misc.automount \
    proc-sys-fs-binfmt_misc.mount systemd-binfmt.service systemd-network-generator.service \
    systemd-pstore.service systemd-repart.service systemd-firstboot.service \
    systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-tmpfiles-clean.timer \
    systemd-ask-password-console.path systemd-ask-password-wall.path systemd-initctl.socket \
    systemd-journald-audit.socket getty.target";
/// Generators of units that find nothing to generate for: each is a program to start at each boot
/// and at each reload of systemd. Those for the kernel command line, `/etc/fstab` and netplan stay.
const MASKED_GENERATORS: &str = "cryptsetup getty gpt-auto hibernate-resume integritysetup rc-local \
    run system-update sysv veritysetup";
/// Files that a machine does not need: documentation and translations are half of the tree.
const EXCLUDED: [&str; 5] = [
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/zoneinfo/*",
];
/// Hook that removes what every machine creates for itself. systemd would take D-Bus' machine id for
/// its own, and derive the link addresses of virtual links from it.
const UNIQUE: &str = ": >\"$1\"/etc/machine-id; \
    rm -f \"$1\"/var/lib/dbus/machine-id \"$1\"/etc/hostname \"$1\"/etc/resolv.conf";
/// UUID of the file system, fixed so that the same tree gives the same disk.
const DISK_ID: &str = "6d0f5f5e-5a5c-4b0e-9d4e-70776c696e65";
/// Size of the disk, most of which is a hole. It is small, so that tests fill it in seconds.
const DISK_SIZE: &str = "1G";
/// Newest modification time of a file in the image: 2023-11-14, in seconds since 1970.
const EPOCH: &str = "1700000000";

/// A built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Path of the disk: a sparse ext4 file system without partitions.
    pub disk: PathBuf,
    /// Path of a static busybox, for the first program of a machine.
    pub busybox: PathBuf,
}

impl Image {
    /// Returns the image from the cache, or builds it, which takes about a minute and downloads 150
    /// MB.
    pub fn get(cache: &Cache) -> anyhow::Result<Self> {
        let mut recipe = [
            PACKAGES.as_slice(),
            &EXCLUDED,
            &[SUITE, ENABLED, DISABLED, MASKED, MASKED_GENERATORS, UNIQUE, DISK_ID, DISK_SIZE],
        ]
        .concat()
        .join(" ");
        for (path, mode, text) in FILES {
            recipe.push_str(&format!("\n{path} {mode:o}\n{text}"));
        }
        let place = cache.entry("image", &[recipe.as_bytes()], None, |place| {
            line(&format!("building the image of Debian {SUITE}, once: one or two minutes"));
            build(place).context("cannot build the image of the machines")
        })?;
        Ok(Self { disk: place.join("disk"), busybox: place.join("busybox") })
    }
}

fn build(place: &std::path::Path) -> anyhow::Result<()> {
    // Without root, the hooks run as another user, who must be able to write here.
    let shared = tempfile::tempdir()?;
    std::fs::set_permissions(shared.path(), Permissions::from_mode(0o777))?;
    let at = |name: &str| shared.path().join(name).display().to_string();
    let entries: Vec<Entry> =
        FILES.iter().map(|(path, mode, text)| Entry::file(path, *mode, (*text).into())).collect();
    std::fs::write(at("files.tar"), tar(&entries)?)?;
    let hooks = [
        format!("tar-in {} /", at("files.tar")),
        format!("chroot \"$1\" systemctl enable {ENABLED}"),
        format!("chroot \"$1\" systemctl --quiet disable {DISABLED} 2>/dev/null || true"),
        format!("chroot \"$1\" systemctl --quiet mask {MASKED}"),
        format!(
            "mkdir -p \"$1\"/etc/systemd/system-generators; for name in {MASKED_GENERATORS}; do \
             ln -s /dev/null \"$1\"/etc/systemd/system-generators/systemd-$name-generator; done"
        ),
        // Mount point of a kernel's modules.
        "mkdir -p \"$1\"/usr/lib/modules".to_owned(),
        UNIQUE.to_owned(),
        "rm -rf \"$1\"/var/lib/apt/lists/* \"$1\"/var/cache/apt/*.bin \"$1\"/var/log/*.log"
            .to_owned(),
        format!("download /bin/busybox {}", at("busybox")),
        format!("chroot \"$1\" dpkg-query --show >{}", at("packages")),
        // File systems that are mounted while the hooks run are excluded.
        format!(
            "mkdir {0} && tar -C \"$1\" --exclude='./proc/*' --exclude='./sys/*' \
             --exclude='./dev/*' -c . | tar -C {0} -x",
            at("tree")
        ),
        format!(
            "mke2fs -q -t ext4 -m 0 -U {DISK_ID} -E hash_seed={DISK_ID},lazy_itable_init=1 \
             -d {} {} {DISK_SIZE}",
            at("tree"),
            at("disk")
        ),
        format!("rm -rf {}; chmod 644 {}", at("tree"), at("disk")),
    ];
    let mut command = tool("mmdebstrap");
    command
        .args(["--quiet", "--variant=minbase", "--format=null"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg("--aptopt=Acquire::Languages \"none\"")
        .args(EXCLUDED.iter().map(|option| format!("--dpkgopt={option}")))
        .args(hooks.iter().map(|hook| format!("--customize-hook={hook}")))
        .args([SUITE, "-"])
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .env("LC_ALL", "C");
    output_of(&mut command)?;
    copy_sparse(&shared.path().join("disk"), &place.join("disk"))?;
    for name in ["busybox", "packages"] {
        std::fs::copy(shared.path().join(name), place.join(name))?;
    }
    Ok(())
}
