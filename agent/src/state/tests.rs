//! Tests of the state directory.

use super::*;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn keys_are_made_once_and_readable_by_the_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("state")).unwrap();
    let first = state.keys_or_generate().unwrap();
    let second = state.keys_or_generate().unwrap();
    assert_eq!(first.identity.public(), second.identity.public());
    assert_eq!(first.wireguard.public(), second.wireguard.public());
    for (name, mode) in [("identity.key", 0o600), ("wireguard.key", 0o600), (".", 0o700)] {
        let meta = std::fs::metadata(state.path().join(name)).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
    }
}

#[test]
fn a_directory_or_key_that_others_can_read_is_refused_with_the_command_that_closes_it() {
    let dir = tempfile::tempdir().unwrap();
    let open = |mode| std::fs::Permissions::from_mode(mode);
    StateDir::open(dir.path()).unwrap().keys_or_generate().unwrap();
    std::fs::set_permissions(dir.path(), open(0o755)).unwrap();
    let error = StateDir::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("chmod 700"), "{error}");
    let error = StateDir::peek(dir.path()).membership().unwrap_err().to_string();
    assert!(error.contains("chmod 700"), "{error}");
    std::fs::set_permissions(dir.path(), open(0o700)).unwrap();
    for name in ["identity.key", "wireguard.key"] {
        let path = dir.path().join(name);
        std::fs::set_permissions(&path, open(0o640)).unwrap();
        let error = StateDir::open(dir.path()).unwrap().keys().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("chmod 600"), "{error}");
        std::fs::set_permissions(&path, open(0o600)).unwrap();
    }
    StateDir::open(dir.path()).unwrap().keys().unwrap();
}

#[test]
fn what_is_only_looked_at_need_not_exist() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::peek(&dir.path().join("absent"));
    assert!(state.membership().unwrap().is_none());
    assert!(matches!(state.keys(), Err(StateError::NotJoined { .. })));
}

#[test]
fn a_second_agent_is_told_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let _first = StateDir::open(dir.path()).unwrap();
    let second = StateDir::open(dir.path()).unwrap_err();
    assert!(matches!(second, StateError::Locked { .. }), "{second}");
}

#[test]
fn a_machine_that_has_not_joined_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let error = state.require_membership().unwrap_err().to_string();
    assert!(error.contains("towline join"), "{error}");
}

#[test]
fn damaged_files_name_themselves_and_the_way_back() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    state.keys_or_generate().unwrap();
    for name in ["identity.key", "wireguard.key"] {
        let good = std::fs::read(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name), &good[..good.len() / 2]).unwrap();
        let error = state.keys().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("join again"), "{error}");
        std::fs::write(dir.path().join(name), good).unwrap();
    }
    std::fs::write(dir.path().join("membership.json"), "{").unwrap();
    let error = state.membership().unwrap_err().to_string();
    assert!(error.contains("membership.json") && error.contains("join again"), "{error}");
}

#[test]
fn the_boot_epoch_grows_whatever_the_clock_says() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let epoch = |now| state.start(now).unwrap().boot_epoch;
    assert_eq!([epoch(100), epoch(50), epoch(0), epoch(200)], [100, 101, 102, 200]);
}

#[test]
fn an_agent_waits_for_a_guard_and_a_guard_for_no_agent() {
    let dir = tempfile::tempdir().unwrap();
    assert!(StateDir::open_shared(&dir.path().join("missing")).is_ok());
    assert!(!dir.path().join("missing").exists());
    let guards = [(); 2].map(|()| StateDir::open_shared(dir.path()).unwrap());
    let path = dir.path().to_owned();
    let agent = std::thread::spawn(move || StateDir::open(&path).unwrap());
    drop(guards);
    let _agent = agent.join().unwrap();
    let guard = StateDir::open_shared(dir.path()).unwrap_err();
    assert!(matches!(guard, StateError::Locked { .. }), "{guard}");
}

/// Mounts a new file system on `directory`, visible to this process only.
fn mount_disk(directory: &Path, flags: nix::mount::MsFlags) {
    use nix::mount::{MsFlags, mount};
    let none = None::<&str>;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("disk"), directory, Some("tmpfs"), flags, Some("size=64k")).unwrap();
}

/// Fills the file system. Returns the file that takes the space.
fn fill(directory: &Path) -> PathBuf {
    let filler = directory.join("filler");
    let mut file = File::create(&filler).unwrap();
    for size in [4_096, 1] {
        while io::Write::write_all(&mut file, &vec![0; size]).is_ok() {}
    }
    filler
}

towline_netns::namespace_test! {
    fn a_full_disk_is_worked_with_and_caught_up_with() {
        let dir = tempfile::tempdir().unwrap();
        mount_disk(dir.path(), nix::mount::MsFlags::empty());
        let state = StateDir::open(dir.path()).unwrap();
        state.keys_or_generate().unwrap();
        state.store_map(b"before").unwrap();
        let first = state.start(100).unwrap();
        drop(state);
        let filler = fill(dir.path());

        let state = StateDir::open(dir.path()).unwrap();
        assert!(state.keys().is_ok());
        let second = state.start(200).unwrap();
        assert!(second.boot_epoch > first.boot_epoch);
        assert!(state.store_map(&[7; 8_192]).is_err());
        let problem = state.unsaved().unwrap().to_string();
        for part in ["counters.json, map.bin", "No space left", &dir.path().display().to_string()] {
            assert!(problem.contains(part), "{problem}");
        }
        assert!(state.save_again().is_err());
        assert_eq!(state.counters().unwrap(), first, "the old content is intact");
        assert_eq!(std::fs::read(dir.path().join("map.bin")).unwrap(), b"before");

        std::fs::remove_file(filler).unwrap();
        state.save_again().unwrap();
        assert_eq!(state.unsaved(), None);
        assert_eq!(state.counters().unwrap(), second);
        assert_eq!(std::fs::read(dir.path().join("map.bin")).unwrap(), [7; 8_192]);
    }
}

towline_netns::namespace_test! {
    fn a_read_only_disk_is_started_on_by_one_agent_at_a_time() {
        use nix::mount::{MsFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        mount_disk(dir.path(), MsFlags::empty());
        let remount = |flags| {
            let none = None::<&str>;
            mount(none, dir.path(), none, MsFlags::MS_REMOUNT | flags, none).unwrap();
        };
        let state = StateDir::open(dir.path()).unwrap();
        state.keys_or_generate().unwrap();
        let first = state.start(100).unwrap();
        drop(state);
        for has_lock_file in [true, false] {
            remount(MsFlags::empty());
            if !has_lock_file {
                std::fs::remove_file(dir.path().join("lock")).unwrap();
            }
            remount(MsFlags::MS_RDONLY);
            let state = StateDir::open(dir.path()).unwrap();
            assert!(state.start(200).unwrap().boot_epoch > first.boot_epoch);
            let problem = state.unsaved().unwrap().to_string();
            assert!(problem.contains("Read-only file system"), "{problem}");
            for second in [StateDir::open(dir.path()), StateDir::open_shared(dir.path())] {
                assert!(matches!(second, Err(StateError::Locked { .. })), "{second:?}");
            }
            drop(state);
            assert!(StateDir::open_shared(dir.path()).is_ok());
            assert!(StateDir::peek(dir.path()).keys().is_ok());
        }
    }
}

#[test]
fn counters_survive() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.counters().unwrap(), Counters::default());
    let counters = Counters { boot_epoch: 3, generation: 9 };
    state.store_counters(counters).unwrap();
    assert_eq!(state.counters().unwrap(), counters);
}

#[test]
fn the_networks_of_the_join_are_forgotten_with_it_and_never_stop_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("state")).unwrap();
    let lan: IpNet = "192.168.1.0/24".parse().unwrap();
    state.store_connected_networks(&[lan]).unwrap();
    assert_eq!(state.connected_networks(), [lan]);
    state.forget().unwrap();
    assert_eq!(state.connected_networks(), [], "of the next mesh they are none");

    let file = state.path().join("networks.json");
    std::fs::write(&file, "no list").unwrap();
    assert_eq!(state.connected_networks(), []);
    // A file that cannot be read.
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert_eq!(state.connected_networks(), []);
}

#[test]
fn the_confirmation_of_the_map_outlives_a_restart_and_a_damaged_one_counts_as_old() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.confirmation(), None);
    state.store_confirmation(1_700_000_000).unwrap();
    assert_eq!(StateDir::peek(dir.path()).confirmation(), Some(1_700_000_000));
    std::fs::write(dir.path().join("confirmed"), "yesterday").unwrap();
    assert_eq!(state.confirmation(), Some(0));
    state.forget().unwrap();
    assert_eq!(state.confirmation(), None, "another join begins with a new map");
}
