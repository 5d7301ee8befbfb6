//! Tests of start, configuration, load and periodic work.

use super::*;

#[test]
fn an_ephemeral_node_goes_when_it_stays_away_and_others_never_do() {
    let mut world = World::new();
    let stays = world.node("stays", 1, &[]);
    let token = world.token(TokenTerms { ephemeral: true, uses: 2, ..terms() });
    let goes = world.join(token, "goes", 2).unwrap();
    let connected = world.join(token, "connected", 3).unwrap();
    world.open(connected);
    world.close(stays);
    world.advance(LEASE);
    assert!(world.registry.member(goes).is_ok());
    world.advance(Duration::from_secs(1));
    assert!(world.is_removed(goes));
    world.advance(LEASE * 100);
    assert!(world.registry.member(stays).is_ok());
    assert!(world.registry.member(connected).is_ok());
}

#[test]
fn an_ephemeral_node_goes_after_the_time_of_its_token() {
    let mut world = World::new();
    let after = Duration::from_secs(90);
    let terms = |after| TokenTerms { ephemeral: true, ephemeral_after: Some(after), ..terms() };
    let token = world.token(terms(after));
    let node = world.join(token, "a", 1).unwrap();
    world.advance(after);
    assert!(world.registry.member(node).is_ok());
    world.advance(Duration::from_secs(1));
    assert!(world.is_removed(node));
    for wrong in [Duration::from_secs(59), Duration::from_secs(31 * 24 * 3600)] {
        let id = TokenId([9; 8]);
        let refused = world.registry.create_token(id, SECRET, terms(wrong), i64::MAX, world.now);
        assert_eq!(refused.err(), Some(CreateTokenError::EphemeralAfter(wrong)));
    }
}

#[test]
fn a_controller_that_was_stopped_does_not_remove_the_nodes_that_it_could_not_hear() {
    let mut world = World::new();
    let token = world.token(TokenTerms { ephemeral: true, ..terms() });
    let node = world.join(token, "a", 1).unwrap();
    world.open(node);
    world.advance(Duration::from_secs(60));
    // The process is stopped for a day, and its periodic work is the first that runs then.
    world.now = world.now.plus(LEASE * 144);
    world.registry.tick(&world.sessions, world.now);
    assert!(world.registry.member(node).is_ok());
    world.advance(LEASE);
    assert!(world.registry.member(node).is_ok());
    world.advance(Duration::from_secs(1));
    assert!(world.is_removed(node), "it did not come back");
}

#[test]
fn a_node_relays_if_its_token_or_an_operator_allows_it() {
    let mut world = World::new();
    let token = world.token(TokenTerms { relay: RelayRole::Granted, ..terms() });
    let relay = world.join(token, "relay", 1).unwrap();
    let worker = world.node("worker", 2, &[]);
    let role = |world: &World, node| world.registry.member(node).unwrap().grant.relay;
    assert_eq!(role(&world, relay), RelayRole::Granted);
    assert_eq!(role(&world, worker), RelayRole::Denied);

    let before = world.registry.member(worker).unwrap().clone();
    world.registry.set_relay(worker, true, world.now).unwrap();
    world.commit();
    world.reload();
    let after = world.registry.member(worker).unwrap().clone();
    assert_eq!(role(&world, worker), RelayRole::Granted);
    assert!(after.revision > before.revision, "watchers see it");
    assert!(after.grant.issued_at > before.grant.issued_at, "it replaces the grant before it");
    world.registry.set_relay(worker, true, world.now).unwrap();
    world.commit();
    assert_eq!(world.registry.member(worker).unwrap().revision, after.revision);
    world.registry.set_relay(relay, false, world.now).unwrap();
    assert_eq!(role(&world, relay), RelayRole::Denied);
    let gone = world.remove(worker).node_id;
    assert!(world.registry.set_relay(gone, true, world.now).is_err());
}

#[test]
fn a_restored_store_voids_open_tokens_and_begins_a_new_epoch() {
    let mut world = World::new();
    let started = world.registry.start(None, world.now);
    let began = u64::try_from(world.now.unix).unwrap();
    assert_eq!(started.starts, Starts { count: 1, epoch: began });
    assert!(!started.restored);
    let token = world.token(terms());
    world.commit();
    let node = world.node("a", 1, &[]);
    let backup = world.stored.clone();

    let tombstone = world.remove(node);
    let started = world.registry.start(Some(started.starts), world.now);
    assert!(!started.restored);
    world.commit();

    world.stored = backup;
    world.reload();
    assert!(world.registry.member(node).is_ok(), "the backup is older than the removal");
    let started = world.registry.start(Some(started.starts), world.now);
    assert!(started.restored);
    assert_eq!((started.starts.epoch, started.voided), (began + 1, 2));
    assert!(matches!(world.join(token, "b", 2), Err(JoinError::TokenRevoked { .. })));

    let known = vec![tombstone];
    assert_eq!(world.registry.resync(known.clone(), &world.sessions, world.now), 1);
    assert_eq!(world.registry.resync(known, &world.sessions, world.now), 0);
    assert!(world.is_removed(node));
}

#[test]
fn a_backup_that_is_restored_twice_begins_two_epochs() {
    let mut world = World::new();
    world.registry.start(None, world.now);
    world.commit();
    world.stored.counters.is_backup = true;
    let mut restore = |later: u64| {
        world.reload();
        let now = world.now.plus(Duration::from_secs(later));
        world.registry.start(None, now).starts.epoch
    };
    let (first, second) = (restore(60), restore(90));
    assert!(second > first, "{first} {second}");
}

#[test]
fn only_a_later_head_of_this_mesh_begins_a_new_epoch() {
    let mut world = World::new();
    let token = world.token(terms());
    let counters = world.registry.counters();
    let mesh_id = world.registry.mesh().config.mesh_id;
    let (epoch, revision) = (counters.epoch, counters.revision);
    let mut prove = |mesh_id, epoch, revision| {
        world.registry.prove_later(Head { mesh_id, epoch, revision }, world.now)
    };
    assert_eq!(prove(mesh_id, epoch, revision), None, "the present one");
    assert_eq!(prove(MeshId([9; 16]), epoch, revision + 9), None, "another mesh");
    assert_eq!(prove(mesh_id, epoch, revision + 9), Some(1));
    assert_eq!(prove(mesh_id, epoch, revision + 9), None, "once");
    world.commit();
    let after = world.registry.counters();
    assert!(after.epoch > epoch, "{epoch} {}", after.epoch);
    assert!(after.revision > revision + 9, "no two changes have the same revision");
    assert_eq!(world.registry.mesh().config.epoch, after.epoch);
    assert!(matches!(world.join(token, "b", 2), Err(JoinError::TokenRevoked { .. })));
}

#[test]
fn the_overlay_ranges_stay_while_nodes_live_in_them() {
    let mut world = World::new();
    let change = |mesh: &mut MeshConfig| mesh.overlay_v4 = "198.18.0.0/16".parse().unwrap();
    world.registry.configure(change).unwrap();
    world.node("a", 1, &[]);
    let error = world.registry.configure(|mesh| {
        mesh.overlay_v4 = "198.19.0.0/16".parse().unwrap();
    });
    assert!(error.unwrap_err().to_string().contains("198.18.0.0/16"));
    let generation = world.registry.mesh().config.generation;
    world.registry.configure(|mesh| mesh.protected = vec![net("10.0.0.0/8")]).unwrap();
    assert_eq!(world.registry.mesh().config.generation, generation + 1);
    world.registry.configure(|_| {}).unwrap();
    assert_eq!(world.registry.mesh().config.generation, generation + 1);
}

#[test]
fn stored_values_that_contradict_each_other_are_refused() {
    let mut world = World::new();
    let node = world.node("a", 1, &["10.0.0.0/8"]);
    world.publish(node, 1, &[net("10.0.0.0/8")]).unwrap();
    let good = world.stored.contents(world.now);
    assert!(Registry::load(good.clone()).is_ok());

    let mut twice = good.clone();
    let mut copy = twice.members[0].clone();
    copy.grant.node_id = NodeId([9; 16]);
    copy.record = None;
    twice.members.push(copy);
    assert_eq!(Registry::load(twice).err(), Some(LoadError::NotUnique(NodeId([9; 16]))));

    let mut foreign = good;
    foreign.members[0].grant.allowed_prefixes.clear();
    assert!(matches!(Registry::load(foreign), Err(LoadError::NotGranted { .. })));
}

#[test]
fn last_seen_is_stored_at_most_once_a_minute_and_a_session_writes_nothing_else() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let mut written = 0;
    for _ in 0..24 {
        world.close(node);
        world.now = world.now.plus(Duration::from_secs(5));
        world.open(node);
        world.registry.tick(&world.sessions, world.now);
        let keys = world.commit();
        assert!(keys.iter().all(|key| matches!(key, Key::LastSeen | Key::Counters)), "{keys:?}");
        written += usize::from(keys.contains(&Key::LastSeen));
    }
    assert_eq!(written, 2, "in two minutes");
    assert_eq!(world.sessions.all_last_seen(world.now)[&node], world.now.unix);
}
