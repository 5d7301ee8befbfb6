//! Only root of the whole machine can change owners. Tests that need this print that they were
//! skipped if it is not possible.

use std::os::unix::fs::{chown, symlink};

use super::*;

/// Account of a daemon. No test runs as it, and it need not exist.
const SERVICE: Account = Account { uid: 64_123, gid: 64_124 };

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn owner(path: &Path) -> Account {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    Account { uid: metadata.uid(), gid: metadata.gid() }
}

/// Returns a directory, if owners can be changed on this machine.
fn as_root() -> Option<tempfile::TempDir> {
    let directory = tempfile::tempdir().unwrap();
    let probe = directory.path().join("probe");
    std::fs::write(&probe, "").unwrap();
    if chown(&probe, Some(SERVICE.uid), Some(SERVICE.gid)).is_err() {
        println!("skipped: only root of the machine can change owners");
        return None;
    }
    std::fs::remove_file(&probe).unwrap();
    Some(directory)
}

#[test]
fn what_root_creates_belongs_to_the_service() {
    let Some(root) = as_root() else { return };
    let path = root.path().join("state");
    let directory = PrivateDirectory::create(&path, Some(SERVICE)).unwrap();
    directory.replace("identity.key", 0o600, b"secret").unwrap();
    directory.replace("identity.key", 0o600, b"secret two").unwrap();
    let _lock = directory.open_lock("lock").unwrap();
    for name in ["", "identity.key", "lock"] {
        assert_eq!(owner(&path.join(name)), SERVICE, "{name}");
    }
    assert_eq!(directory.read_key("identity.key").unwrap().unwrap().as_slice(), b"secret two");
    // A later run by root gives its files to the directory's owner.
    let again = PrivateDirectory::open(&path, Some(SERVICE)).unwrap();
    again.replace("membership.json", 0o600, b"{}").unwrap();
    assert_eq!(owner(&path.join("membership.json")), SERVICE);
}

#[test]
fn an_empty_directory_of_root_is_given_to_the_service_and_a_full_one_is_not() {
    let Some(root) = as_root() else { return };
    let empty = root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    set_mode(&empty, 0o755);
    PrivateDirectory::create(&empty, Some(SERVICE)).unwrap();
    assert_eq!(owner(&empty), SERVICE);
    assert_eq!(std::fs::metadata(&empty).unwrap().mode() & 0o777, 0o700);

    // Files of a version that ran as root: the owners of the directory and the files stay.
    let full = root.path().join("full");
    let old = PrivateDirectory::create(&full, None).unwrap();
    old.replace("identity.key", 0o600, b"old").unwrap();
    let new = PrivateDirectory::create(&full, Some(SERVICE)).unwrap();
    new.replace("counters.json", 0o600, b"{}").unwrap();
    for name in ["", "identity.key", "counters.json"] {
        assert_eq!(owner(&full.join(name)).uid, 0, "{name}");
    }
}

#[test]
fn a_directory_that_others_can_enter_is_refused_with_the_command_that_closes_it() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state");
    let directory = PrivateDirectory::create(&path, None).unwrap();
    directory.replace("identity.key", 0o600, b"secret").unwrap();
    for mode in [0o755, 0o750, 0o710, 0o701, 0o770, 0o1777] {
        set_mode(&path, mode);
        let error = PrivateDirectory::create(&path, None).unwrap_err().to_string();
        let shown = path.display();
        assert_eq!(
            error,
            format!(
                "state directory {shown} is readable by others: mode {mode:04o}: run `chmod 700 {shown}`"
            )
        );
        PrivateDirectory::open(&path, None).unwrap_err();
    }
    set_mode(&path, 0o700);
    PrivateDirectory::open(&path, None).unwrap();
}

#[test]
fn an_empty_directory_that_others_can_enter_is_closed() {
    let root = tempfile::tempdir().unwrap();
    set_mode(root.path(), 0o755);
    PrivateDirectory::create(root.path(), None).unwrap();
    assert_eq!(std::fs::metadata(root.path()).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_key_that_others_can_read_is_refused_and_other_files_are_not() {
    let root = tempfile::tempdir().unwrap();
    let directory = PrivateDirectory::create(root.path(), None).unwrap();
    directory.replace("identity.key", 0o600, b"secret").unwrap();
    let path = root.path().join("identity.key");
    for mode in [0o644, 0o640, 0o604, 0o620] {
        set_mode(&path, mode);
        let error = directory.read_key("identity.key").unwrap_err().to_string();
        assert!(error.ends_with(&format!("run `chmod 600 {}`", path.display())), "{error}");
        assert!(directory.read("identity.key").unwrap().is_some());
    }
    set_mode(&path, 0o400);
    assert!(directory.read_key("identity.key").unwrap().is_some());
    assert!(directory.read_key("absent").unwrap().is_none());
}

#[test]
fn a_directory_or_key_of_somebody_else_is_refused() {
    let Some(root) = as_root() else { return };
    let path = root.path().join("state");
    let directory = PrivateDirectory::create(&path, None).unwrap();
    directory.replace("identity.key", 0o600, b"secret").unwrap();
    chown(path.join("identity.key"), Some(64_999), Some(64_999)).unwrap();
    let error = directory.read_key("identity.key").unwrap_err().to_string();
    assert!(error.contains("uid 64999") && error.contains("chown -R 0 "), "{error}");
    chown(&path, Some(64_999), Some(64_999)).unwrap();
    for service in [None, Some(SERVICE)] {
        let error = PrivateDirectory::create(&path, service).unwrap_err().to_string();
        assert!(error.contains("uid 64999"), "{error}");
    }
}

#[test]
fn a_left_over_file_lends_neither_its_mode_nor_its_target() {
    let root = tempfile::tempdir().unwrap();
    let directory = PrivateDirectory::create(&root.path().join("state"), None).unwrap();
    let victim = root.path().join("victim");
    std::fs::write(&victim, "untouched").unwrap();
    let beside = directory.path().join(".identity.key.new");
    for plant in [true, false] {
        if plant {
            symlink(&victim, &beside).unwrap();
        } else {
            std::fs::write(&beside, "left over").unwrap();
            set_mode(&beside, 0o644);
        }
        directory.replace("identity.key", 0o600, b"secret").unwrap();
        let metadata = std::fs::symlink_metadata(directory.path().join("identity.key")).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
    }
    // A link in the place of the file itself is replaced, not followed.
    let place = directory.path().join("membership.json");
    symlink(&victim, &place).unwrap();
    directory.replace("membership.json", 0o600, b"{}").unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
}

#[test]
fn root_follows_no_link_in_a_directory_of_the_service() {
    let Some(root) = as_root() else { return };
    let path = root.path().join("state");
    let directory = PrivateDirectory::create(&path, Some(SERVICE)).unwrap();
    let victim = root.path().join("victim");
    std::fs::write(&victim, "root's").unwrap();
    for name in ["join-failure", "lock"] {
        symlink(&victim, path.join(name)).unwrap();
    }
    let error = directory.read("join-failure").unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    directory.open_lock("lock").unwrap_err();
    assert_eq!(owner(&victim).uid, 0);
    nix::unistd::mkfifo(&path.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    directory.read("pipe").expect_err("a pipe is not waited for");
}

#[test]
fn a_state_directory_of_root_moves_to_the_service_and_back() {
    let Some(root) = as_root() else { return };
    let path = root.path().join("state");
    let old = PrivateDirectory::create(&path, None).unwrap();
    old.replace("identity.key", 0o600, b"secret").unwrap();
    drop(old.open_lock("lock").unwrap());
    // Changes owners as systemd does for `StateDirectory=` when `User=` changes.
    let change = |to: Account| {
        for name in ["identity.key", "lock", ""] {
            chown(path.join(name), Some(to.uid), Some(to.gid)).unwrap();
        }
    };
    change(SERVICE);
    let new = PrivateDirectory::create(&path, Some(SERVICE)).unwrap();
    new.replace("identity.key", 0o600, b"renewed").unwrap();
    assert_eq!(owner(&path.join("identity.key")), SERVICE);
    change(Account { uid: 0, gid: 0 });
    let back = PrivateDirectory::create(&path, None).unwrap();
    assert_eq!(back.read_key("identity.key").unwrap().unwrap().as_slice(), b"renewed");
}
