//! Installation of a machine as a node that survives reboots: files and units, and what an
//! unattended join that fails leaves behind.
//!
//! Everything is idempotent. Files with the wanted content are not written, files that an operator
//! may have changed are not overwritten, and units of a package are not touched.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use towline_service::account::{self, Account};
use towline_service::directory::PrivateDirectory;
use towline_service::file;

use crate::config::{Config, DEFAULT_PATH};
use crate::state::{JOIN_FAILURE, StateDir};

/// Name and content of a unit.
type Unit = (&'static str, &'static str);

/// Units and drop-ins that are installed, below [`ADMIN_UNITS`].
const UNITS: &[Unit] = &[
    ("towline.service", include_str!("../../deploy/systemd/towline.service")),
    (GUARD, include_str!("../../deploy/systemd/towline-guard.service")),
    (HELPER, include_str!("../../deploy/systemd/towline-helper.socket")),
    ("towline-helper@.service", include_str!("../../deploy/systemd/towline-helper@.service")),
    ("towline-join.service", include_str!("../../deploy/systemd/towline-join.service")),
    ("towline-join.timer", include_str!("../../deploy/systemd/towline-join.timer")),
    (
        "kubelet.service.d/10-towline.conf",
        include_str!("../../deploy/systemd/kubelet.service.d/10-towline.conf"),
    ),
    (
        "k3s-agent.service.d/10-towline.conf",
        include_str!("../../deploy/systemd/k3s-agent.service.d/10-towline.conf"),
    ),
    (
        "rke2-agent.service.d/10-towline.conf",
        include_str!("../../deploy/systemd/rke2-agent.service.d/10-towline.conf"),
    ),
];

/// Declarations of system users and directories, below `/usr/lib` (from a package) or `/etc`
/// (written by this module).
const DECLARATIONS: [(&str, &str); 2] = [
    ("sysusers.d/towline.conf", include_str!("../../deploy/systemd/sysusers.d/towline.conf")),
    ("tmpfiles.d/towline.conf", include_str!("../../deploy/systemd/tmpfiles.d/towline.conf")),
];

/// Settings that keep systemd-networkd from removing Towline's rules and routes. A package ships
/// them in one of [`PACKAGE_NETWORKD_FILES`].
const NETWORKD: &str = include_str!("../../deploy/systemd/networkd.conf.d/10-towline.conf");
/// Path of [`NETWORKD`] if no package ships it.
const NETWORKD_FILE: &str = "/etc/systemd/networkd.conf.d/10-towline.conf";
/// Paths at which a package ships [`NETWORKD`].
const PACKAGE_NETWORKD_FILES: [&str; 2] = [
    "/usr/lib/systemd/networkd.conf.d/10-towline.conf",
    "/lib/systemd/networkd.conf.d/10-towline.conf",
];
/// Directory of the units that this module writes.
const ADMIN_UNITS: &str = "/etc/systemd/system";
/// Directories of the units that a package ships.
const PACKAGE_UNITS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];
/// Directories for the programs, in the order in which they are tried: `/usr` is read-only on some
/// systems, and `/usr/local` and `/opt` on others. The last one belongs to root like the others, and is
/// not the state directory: its owner, the agent's user, must not replace what root runs.
const PROGRAM_DIRECTORIES: [&str; 4] =
    ["/usr/bin", "/usr/local/bin", "/opt/bin", "/var/lib/towline-programs"];
/// File that a Debian package's installation leaves.
const DEBIAN_PACKAGE: &str = "/var/lib/dpkg/info/towline.list";
/// Name of the agent's program.
const PROGRAM: &str = "towline";
/// Name of the helper's program, which is shipped next to the agent's.
const HELPER_PROGRAM: &str = "towline-helper";
const AGENT: &str = "towline.service";
const HELPER: &str = "towline-helper.socket";
const GUARD: &str = "towline-guard.service";
/// Timer that repeats a failed join.
const RETRY_TIMER: &str = "towline-join.timer";
/// Path of the token for a retry.
pub const TOKEN: &str = "/etc/towline/token";
/// Paths of the files that the drop-ins for k3s and RKE2 write.
const RANCHER_ADDRESSES: [&str; 2] = [
    "/etc/rancher/k3s/config.yaml.d/10-towline.yaml",
    "/etc/rancher/rke2/config.yaml.d/10-towline.yaml",
];

/// Tree to install into: the machine, or a directory.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

/// Result of an installation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Files that were written, as paths inside the tree.
    pub written: Vec<PathBuf>,
}

impl Tree {
    /// Returns the tree of the machine itself, or the one at `root`.
    pub fn new(root: Option<&Path>) -> Self {
        Self { root: root.unwrap_or(Path::new("/")).to_owned() }
    }

    /// Returns the real path of a path inside the tree.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        self.root.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Returns whether the tree is the running machine, and systemd is its init system.
    pub fn has_systemd(&self) -> bool {
        self.root == Path::new("/") && Path::new("/run/systemd/system").is_dir()
    }

    /// Writes what a join needs: the configuration, and the users that own the state directory.
    pub fn prepare(&self, configuration: &str) -> anyhow::Result<Changes> {
        let mut changes = Changes::default();
        self.users(&mut changes)?;
        if !self.path(DEFAULT_PATH).exists() {
            self.write(DEFAULT_PATH, configuration.as_bytes(), 0o644, &mut changes)?;
        }
        Ok(changes)
    }

    /// Writes the programs and the units.
    pub fn install(&self) -> anyhow::Result<Changes> {
        let mut changes = Changes::default();
        self.users(&mut changes)?;
        let directory = self.programs(&mut changes)?;
        for unit in UNITS {
            self.unit(*unit, directory, &mut changes)?;
        }
        if !PACKAGE_NETWORKD_FILES.iter().any(|place| self.path(place).is_file()) {
            self.write(NETWORKD_FILE, NETWORKD.as_bytes(), 0o644, &mut changes)?;
        }
        if self.has_systemd() && !changes.written.is_empty() {
            systemctl(&["daemon-reload"])?;
            // The agent's `RuntimeDirectory=` would create the directory too, but only when the
            // agent starts.
            let _ = run(&["systemd-tmpfiles", "--create", "towline.conf"]);
        }
        Ok(changes)
    }

    /// Enables the agent and its guard at boot. Starts the agent if the machine runs systemd.
    pub fn start(&self) -> anyhow::Result<()> {
        self.enable(GUARD, "sysinit.target")?;
        self.enable(HELPER, "sockets.target")?;
        self.enable(AGENT, "multi-user.target")?;
        if self.has_systemd() {
            // The caller waits for the mesh, with its own time limit.
            systemctl(&["start", "--no-block", AGENT])?;
        }
        Ok(())
    }

    /// Returns whether the installed units run an agent with this state directory.
    pub fn serves(&self, state_dir: &Path) -> bool {
        let file = self.path(DEFAULT_PATH);
        let config = if file.exists() { Config::load(Some(&file)) } else { Ok(Config::default()) };
        let theirs = config.map(|config| self.path(config.state_dir));
        let same = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        theirs.is_ok_and(|theirs| same(&theirs) == same(state_dir))
    }

    /// Returns whether the agent's unit is installed.
    pub fn has_agent_unit(&self) -> bool {
        self.path(self.unit_place(AGENT)).is_file()
    }

    /// Starts the agent's unit with systemd, without waiting for it.
    pub fn start_agent(&self) -> anyhow::Result<()> {
        // A start limit must not prevent this start.
        let _ = systemctl(&["reset-failed", AGENT]);
        systemctl(&["start", "--no-block", AGENT])
    }

    /// Reverses [`Self::start`], so that nothing of Towline starts at the next boot. Also removes
    /// the drop-ins for the kubelet and k3s, which would wait for a mesh, unless they were changed.
    /// Returns what was done, one line each.
    pub fn disable(&self) -> anyhow::Result<Vec<String>> {
        let mut done = Vec::new();
        let wants = [
            (RETRY_TIMER, "timers.target"),
            (AGENT, "multi-user.target"),
            (GUARD, "sysinit.target"),
        ];
        for (unit, target) in wants {
            let link = self.path(ADMIN_UNITS).join(format!("{target}.wants")).join(unit);
            if link.is_symlink() {
                remove(&link)?;
                done.push(format!("disabled {unit}"));
            }
        }
        for (name, text) in UNITS.iter().filter(|(name, _)| name.ends_with(".conf")) {
            let path = Path::new(ADMIN_UNITS).join(name);
            match std::fs::read_to_string(self.path(&path)) {
                Ok(found) if is_ours(&found, text) => {
                    remove(&self.path(&path))?;
                    done.push(format!("removed {}", path.display()));
                }
                Ok(_) => done.push(format!("left {}: it was changed", path.display())),
                Err(_) => {}
            }
        }
        for address in RANCHER_ADDRESSES {
            let path = self.path(address);
            if std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with("node-ip: ")) {
                remove(&path)?;
                done.push(format!("removed {address}"));
            }
        }
        if self.has_systemd() && !done.is_empty() {
            systemctl(&["daemon-reload"])?;
            for unit in [RETRY_TIMER, AGENT, GUARD] {
                // Stopping a unit that was never loaded fails, which is fine.
                let _ = systemctl(&["stop", "--no-block", unit]);
            }
        }
        Ok(done)
    }

    /// Stores the token for retries. It is single-use; a successful join removes it.
    pub fn keep_token(&self, token: &str) -> anyhow::Result<()> {
        self.write(TOKEN, token.as_bytes(), 0o600, &mut Changes::default())
    }

    /// Stores the reason of a failed join.
    pub fn store_failure(&self, config: &Config, reason: &str) -> anyhow::Result<()> {
        let directory = self.state(config)?;
        Ok(directory.replace(JOIN_FAILURE, 0o600, format!("{reason}\n").as_bytes())?)
    }

    /// Enables the timer that repeats a failed join.
    pub fn enable_retry(&self) -> anyhow::Result<()> {
        self.enable(RETRY_TIMER, "timers.target")
    }

    /// Removes what a failed join left: reason, timer and token.
    pub fn succeeded(&self, config: &Config) -> anyhow::Result<()> {
        self.state(config)?.remove(JOIN_FAILURE)?;
        remove(&self.path(TOKEN))?;
        self.disable_retry()
    }

    /// Returns why the last unattended join failed, if it did.
    pub fn failure(&self, config: &Config) -> Option<String> {
        StateDir::peek(&self.path(&config.state_dir)).join_failure().ok().flatten()
    }

    /// Returns the state directory. It belongs to the agent's user of the tree, if that user
    /// exists.
    pub fn state(&self, config: &Config) -> anyhow::Result<PrivateDirectory> {
        let path = self.path(&config.state_dir);
        Ok(PrivateDirectory::create(&path, self.account(account::AGENT)?)?)
    }

    fn account(&self, name: &str) -> anyhow::Result<Option<Account>> {
        let passwd = self.path(account::PASSWD);
        account::find_in(&passwd, name).with_context(|| format!("cannot read {}", passwd.display()))
    }

    /// Declares the system users and their directories, and creates the users that do not exist.
    fn users(&self, changes: &mut Changes) -> anyhow::Result<()> {
        for (place, text) in DECLARATIONS {
            let packaged = self.path(Path::new("/usr/lib").join(place)).is_file();
            if packaged {
                continue;
            }
            let written =
                self.write(Path::new("/etc").join(place), text.as_bytes(), 0o644, changes);
            // Users that exist need no declaration.
            if written.is_err() && self.account(account::AGENT)?.is_none() {
                return written;
            }
        }
        // A tree without `/etc/passwd` is not a system yet. It creates the users from the
        // declaration when it boots.
        if self.account(account::AGENT)?.is_some() || !self.path(account::PASSWD).exists() {
            return Ok(());
        }
        let made = self.make_users();
        if self.account(account::AGENT)?.is_none() && self.has_systemd() {
            let name = account::AGENT;
            return Err(made.err().unwrap_or_else(|| anyhow::anyhow!("no program created it")))
                .context(format!(
                    "cannot create the system user `{name}`: run `useradd --system --user-group \
                     --no-create-home --shell /usr/sbin/nologin {name}`"
                ));
        }
        Ok(())
    }

    /// Creates the users with the first program that succeeds.
    fn make_users(&self) -> anyhow::Result<()> {
        let root = self.root.display();
        let sysusers = format!("--root={root}");
        let mut tries = vec![vec!["systemd-sysusers", &sysusers, "towline.conf"]];
        let prefix = self.root.to_string_lossy();
        for name in [account::AGENT, account::CONTROLLER] {
            let mut useradd = vec!["useradd", "--system", "--user-group", "--no-create-home"];
            useradd.extend(["--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]);
            useradd.extend(["--prefix", &prefix, name]);
            tries.push(useradd);
        }
        let mut result = Err(anyhow::anyhow!("there is neither systemd-sysusers nor useradd"));
        for words in &tries {
            result = run(words);
            if self.account(account::AGENT)?.is_some()
                && self.account(account::CONTROLLER)?.is_some()
            {
                return Ok(());
            }
        }
        result
    }

    /// Removes the settings of systemd-networkd that [`Self::install`] wrote. Without a mesh there
    /// is nothing that networkd could remove.
    pub fn remove_networkd_settings(&self) -> anyhow::Result<()> {
        let path = self.path(NETWORKD_FILE);
        if std::fs::read(&path).is_ok_and(|found| found == NETWORKD.as_bytes()) {
            remove(&path)?;
        }
        Ok(())
    }

    /// Stops and disables the timer that repeats a failed join.
    pub fn disable_retry(&self) -> anyhow::Result<()> {
        let link = self.path(ADMIN_UNITS).join("timers.target.wants").join(RETRY_TIMER);
        if link.is_symlink() {
            remove(&link)?;
            if self.has_systemd() {
                systemctl(&["daemon-reload"])?;
                systemctl(&["stop", "--no-block", RETRY_TIMER])?;
            }
        }
        Ok(())
    }

    /// Enables a unit in a target, and starts it if it is a timer.
    fn enable(&self, unit: &str, target: &str) -> anyhow::Result<()> {
        let wants = self.path(ADMIN_UNITS).join(format!("{target}.wants"));
        std::fs::create_dir_all(&wants)
            .with_context(|| format!("cannot create {}", wants.display()))?;
        let link = wants.join(unit);
        if !link.is_symlink() {
            symlink(self.unit_place(unit), &link)
                .with_context(|| format!("cannot create {}", link.display()))?;
            if self.has_systemd() {
                systemctl(&["daemon-reload"])?;
            }
        }
        if self.has_systemd() && unit.ends_with(".timer") {
            systemctl(&["start", unit])?;
        }
        Ok(())
    }

    /// Returns the path of a unit inside the tree: the package's, or else the one written by this
    /// module.
    fn unit_place(&self, unit: &str) -> PathBuf {
        let packaged = PACKAGE_UNITS.iter().map(|place| Path::new(place).join(unit));
        packaged
            .into_iter()
            .find(|path| self.path(path).is_file())
            .unwrap_or_else(|| Path::new(ADMIN_UNITS).join(unit))
    }

    /// Writes a unit that runs the programs of this directory.
    fn unit(
        &self,
        (name, text): Unit,
        directory: &str,
        changes: &mut Changes,
    ) -> anyhow::Result<()> {
        let place = self.unit_place(name);
        if place.starts_with(ADMIN_UNITS) {
            self.write(place, unit_for(text, directory).as_bytes(), 0o644, changes)?;
        }
        Ok(())
    }

    /// Copies the running programs to the first of [`PROGRAM_DIRECTORIES`] that takes them, and returns
    /// it. Programs that are in one of these already stay there.
    fn programs(&self, changes: &mut Changes) -> anyhow::Result<&'static str> {
        if self.path(DEBIAN_PACKAGE).exists() {
            return Ok(PROGRAM_DIRECTORIES[0]);
        }
        let running = std::env::current_exe().context("cannot find the running program")?;
        let is_there = |directory: &&&str| {
            let place = self.path(directory).join(PROGRAM);
            place.canonicalize().is_ok_and(|place| place == running)
        };
        if let Some(directory) = PROGRAM_DIRECTORIES.iter().find(is_there) {
            return Ok(directory);
        }
        let bytes = std::fs::read(&running)
            .with_context(|| format!("cannot read {}", running.display()))?;
        // Without the helper the agent cannot open files that only root may read.
        let helper = std::fs::read(running.with_file_name(HELPER_PROGRAM)).ok();
        let mut reasons = Vec::new();
        for directory in PROGRAM_DIRECTORIES {
            let place = |name| Path::new(directory).join(name);
            let written = self.write(place(PROGRAM), &bytes, 0o755, changes).and_then(|()| {
                helper.as_ref().map_or(Ok(()), |helper| {
                    self.write(place(HELPER_PROGRAM), helper, 0o755, changes)
                })
            });
            match written {
                Ok(()) => return Ok(directory),
                Err(error) => reasons.push(format!("{error:#}")),
            }
        }
        bail!(
            "no directory takes the program: {}: make one of them writable, then run `towline join \
             --install` again",
            reasons.join("; ")
        )
    }

    /// Writes a file atomically, unless it has the wanted content.
    fn write(
        &self,
        inside: impl AsRef<Path>,
        bytes: &[u8],
        mode: u32,
        changes: &mut Changes,
    ) -> anyhow::Result<()> {
        let path = self.path(&inside);
        if std::fs::read(&path).is_ok_and(|found| found == bytes) {
            return Ok(());
        }
        let put = || -> std::io::Result<()> {
            if let Some(directory) = path.parent() {
                std::fs::create_dir_all(directory)?;
            }
            file::replace(&path, mode, bytes, |_| Ok(()))
        };
        put().with_context(|| format!("cannot write {}", path.display()))?;
        changes.written.push(inside.as_ref().to_owned());
        Ok(())
    }
}

/// Returns the text of a unit that runs the programs of this directory, which must be mounted then.
fn unit_for(text: &str, directory: &str) -> String {
    const STATE: &str = "RequiresMountsFor=/var/lib/towline";
    let default = PROGRAM_DIRECTORIES[0];
    if directory == default {
        return text.to_owned();
    }
    text.replace(&format!("{default}/{PROGRAM}"), &format!("{directory}/{PROGRAM}"))
        .replace(STATE, &format!("{STATE} {directory}"))
}

/// Returns whether this module wrote the text of a unit that was found.
fn is_ours(found: &str, text: &str) -> bool {
    PROGRAM_DIRECTORIES.iter().any(|directory| found == unit_for(text, directory))
}

/// Removes a file. A file that does not exist is fine, also where nothing can be removed.
fn remove(path: &Path) -> anyhow::Result<()> {
    if !path.is_symlink() && !path.exists() {
        return Ok(());
    }
    file::remove(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    run(&[&["systemctl"], arguments].concat())
}

/// Runs a program. A failure contains its stderr.
fn run(words: &[&str]) -> anyhow::Result<()> {
    let finished = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", words[0]))?;
    if !finished.status.success() {
        let output = String::from_utf8_lossy(&finished.stderr);
        bail!("`{}` failed: {}", words.join(" "), output.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn install(tree: &Tree, configuration: &str) -> Changes {
        let mut changes = tree.prepare(configuration).unwrap();
        changes.written.extend(tree.install().unwrap().written);
        changes
    }

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::new(Some(directory.path()));
        (directory, tree)
    }

    #[test]
    fn the_second_time_nothing_is_written() {
        let (_directory, tree) = tree();
        let first = install(&tree, "[node]\n");
        assert!(first.written.contains(&PathBuf::from(DEFAULT_PATH)), "{first:?}");
        tree.start().unwrap();
        assert_eq!(install(&tree, "[node]\n"), Changes::default());
        let link = tree.path("/etc/systemd/system/multi-user.target.wants/towline.service");
        assert_eq!(
            std::fs::read_link(link).unwrap(),
            Path::new("/etc/systemd/system/towline.service")
        );
    }

    #[test]
    fn the_agents_user_is_declared_and_gets_the_state_directory() {
        let (_directory, tree) = tree();
        let config = Config::default();
        let passwd = tree.path(account::PASSWD);
        std::fs::create_dir_all(passwd.parent().unwrap()).unwrap();
        std::fs::write(&passwd, "root:x:0:0::/:/bin/sh\ntowline:x:64123:64124::/:/x\n").unwrap();
        let written = install(&tree, "").written;
        assert!(written.contains(&PathBuf::from("/etc/sysusers.d/towline.conf")), "{written:?}");
        assert!(written.contains(&PathBuf::from("/etc/tmpfiles.d/towline.conf")), "{written:?}");
        tree.store_failure(&config, "no controller answers").unwrap();
        let state = tree.path(&config.state_dir);
        let probe = tree.path("/probe");
        std::fs::write(&probe, "").unwrap();
        if std::os::unix::fs::chown(&probe, Some(64_123), None).is_err() {
            return println!("skipped: only root of the machine can change owners");
        }
        use std::os::unix::fs::MetadataExt as _;
        for path in [state.clone(), state.join(JOIN_FAILURE)] {
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (64_123, 64_124), "{}", path.display());
        }
    }

    #[test]
    fn what_a_package_declares_is_left_to_it() {
        let (_directory, tree) = tree();
        let packaged = tree.path("/usr/lib/sysusers.d/towline.conf");
        std::fs::create_dir_all(packaged.parent().unwrap()).unwrap();
        std::fs::write(packaged, "packaged\n").unwrap();
        install(&tree, "");
        assert!(!tree.path("/etc/sysusers.d/towline.conf").exists());
    }

    #[test]
    fn a_configuration_that_is_there_and_units_of_a_package_are_left_alone() {
        let (_directory, tree) = tree();
        for (path, text) in
            [(DEFAULT_PATH, "# mine\n"), ("/usr/lib/systemd/system/towline.service", "packaged\n")]
        {
            let path = tree.path(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        install(&tree, "[node]\n");
        tree.start().unwrap();
        assert_eq!(std::fs::read_to_string(tree.path(DEFAULT_PATH)).unwrap(), "# mine\n");
        assert!(!tree.path("/etc/systemd/system/towline.service").exists());
        let link = tree.path("/etc/systemd/system/multi-user.target.wants/towline.service");
        assert_eq!(
            std::fs::read_link(link).unwrap(),
            Path::new("/usr/lib/systemd/system/towline.service")
        );
    }

    #[test]
    fn programs_are_where_the_system_lets_them_be_and_units_run_them_there() {
        let unit = "/etc/systemd/system/towline.service";
        let guard = "/etc/systemd/system/towline-guard.service";
        let kubelet = "/etc/systemd/system/kubelet.service.d/10-towline.conf";
        for (blocked, directory) in [
            (vec![], "/usr/bin"),
            (vec!["usr/bin"], "/usr/local/bin"),
            (vec!["usr"], "/opt/bin"),
            (vec!["usr", "opt"], "/var/lib/towline-programs"),
        ] {
            let (_directory, tree) = tree();
            // Nobody, not even root, can create a file below a file.
            for path in blocked {
                let path = tree.path(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
            install(&tree, "");
            tree.start().unwrap();
            let program = format!("{directory}/towline");
            assert!(tree.path(&program).is_file(), "{program}");
            for path in [unit, guard, kubelet] {
                let text = std::fs::read_to_string(tree.path(path)).unwrap();
                let runs = |line: &&str| line.starts_with("Exec") && line.contains("/towline ");
                for line in text.lines().filter(runs) {
                    assert!(line.contains(&format!("{program} ")), "{path}: {line}");
                }
            }
            let text = std::fs::read_to_string(tree.path(guard)).unwrap();
            let mounts = text.lines().find(|line| line.starts_with("RequiresMountsFor=")).unwrap();
            assert_eq!(mounts.ends_with(directory), directory != "/usr/bin", "{mounts}");
            assert_eq!(install(&tree, ""), Changes::default());
            // The drop-in is still known as this module's own.
            tree.disable().unwrap();
            assert!(!tree.path(kubelet).exists());
        }
    }

    #[test]
    fn where_no_directory_takes_the_programs_all_of_them_are_named() {
        let (_directory, tree) = tree();
        for path in ["usr", "opt", "var"] {
            std::fs::write(tree.path(path), "").unwrap();
        }
        tree.prepare("").unwrap();
        let line = format!("{:#}", tree.install().unwrap_err());
        for directory in PROGRAM_DIRECTORIES {
            assert!(line.contains(directory), "{line}");
        }
    }

    #[test]
    fn networkd_leaves_the_guards_alone() {
        let (_directory, tree) = tree();
        let file = tree.path(NETWORKD_FILE);
        install(&tree, "");
        let text = std::fs::read_to_string(&file).unwrap();
        for line in ["[Network]", "ManageForeignRoutingPolicyRules=no", "ManageForeignRoutes=no"] {
            assert!(text.lines().any(|found| found == line), "{line}");
        }
        tree.remove_networkd_settings().unwrap();
        tree.remove_networkd_settings().unwrap();
        assert!(!file.exists());
        // A file that the operator changed is kept.
        std::fs::write(&file, "[Network]\n").unwrap();
        tree.remove_networkd_settings().unwrap();
        assert!(file.exists());
        std::fs::remove_file(&file).unwrap();
        // A package ships its own file.
        let packaged = tree.path(PACKAGE_NETWORKD_FILES[0]);
        std::fs::create_dir_all(packaged.parent().unwrap()).unwrap();
        std::fs::write(packaged, text).unwrap();
        install(&tree, "");
        assert!(!file.exists());
    }

    #[test]
    fn disabling_undoes_the_start_and_leaves_what_a_person_changed() {
        let (_directory, tree) = tree();
        install(&tree, "");
        tree.start().unwrap();
        tree.enable_retry().unwrap();
        let kubelet = tree.path("/etc/systemd/system/kubelet.service.d/10-towline.conf");
        let k3s = tree.path("/etc/systemd/system/k3s-agent.service.d/10-towline.conf");
        std::fs::write(&k3s, "# mine\n").unwrap();
        let done = tree.disable().unwrap().join("\n");
        for target in ["multi-user", "sysinit", "timers"] {
            let wants = tree.path(format!("/etc/systemd/system/{target}.target.wants"));
            assert_eq!(std::fs::read_dir(wants).unwrap().count(), 0, "{target}");
        }
        assert!(!kubelet.exists() && k3s.exists(), "{done}");
        for part in [AGENT, GUARD, RETRY_TIMER, "removed", "was changed"] {
            assert!(done.contains(part), "{done}");
        }
        // The units themselves stay for the next join.
        assert!(tree.path("/etc/systemd/system/towline.service").exists());
        let again = tree.disable().unwrap();
        assert!(again.iter().all(|line| line.starts_with("left ")), "{again:?}");
        install(&tree, "");
        tree.start().unwrap();
        assert!(kubelet.exists(), "the next join installs it again");
    }

    #[test]
    fn units_serve_the_state_directory_of_the_configuration_that_they_read() {
        let (_directory, tree) = tree();
        assert!(tree.serves(&tree.path("/var/lib/towline")));
        assert!(!tree.serves(Path::new("/var/lib/towline")));
        install(&tree, "state_dir = \"/srv/towline\"\n");
        assert!(tree.serves(&tree.path("/srv/towline")));
        assert!(!tree.serves(&tree.path("/var/lib/towline")));
    }

    #[test]
    fn a_failure_leaves_its_reason_and_a_timer_until_a_join_succeeds() {
        let (_directory, tree) = tree();
        let config = Config::default();
        let timer = tree.path("/etc/systemd/system/timers.target.wants/towline-join.timer");
        install(&tree, "");
        tree.keep_token("a token").unwrap();
        let mode = std::fs::metadata(tree.path(TOKEN)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        tree.store_failure(&config, "no controller answers").unwrap();
        tree.enable_retry().unwrap();
        assert_eq!(tree.failure(&config).as_deref(), Some("no controller answers\n"));
        assert!(timer.is_symlink());
        tree.disable_retry().unwrap();
        assert!(!timer.is_symlink());
        tree.enable_retry().unwrap();
        tree.succeeded(&config).unwrap();
        assert_eq!(tree.failure(&config), None);
        assert!(!timer.is_symlink() && !tree.path(TOKEN).exists());
    }
}
