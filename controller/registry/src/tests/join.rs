//! Tests of admission.

use super::*;

#[test]
fn a_token_admits_as_many_as_it_says_and_says_why_not_otherwise() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    assert!(matches!(world.join(token, "b", 2), Err(JoinError::TokenUsed { .. })));

    let two = world.token(TokenTerms { uses: 2, ..terms() });
    world.join(two, "b", 2).unwrap();
    world.join(two, "c", 3).unwrap();
    assert!(matches!(world.join(two, "d", 4), Err(JoinError::TokenUsed { .. })));

    let unknown = world.join(TokenId([99; 8]), "d", 4);
    assert!(matches!(unknown, Err(JoinError::TokenUnknown(_))));

    let revoked = world.token(terms());
    world.registry.revoke_token(revoked).unwrap();
    assert!(matches!(world.join(revoked, "d", 4), Err(JoinError::TokenRevoked { .. })));

    let expired = world.token(terms());
    world.advance(Duration::from_secs(3600));
    assert!(matches!(world.join(expired, "d", 4), Err(JoinError::TokenExpired { .. })));

    let pattern = Some("worker-*".parse().unwrap());
    let workers = world.token(TokenTerms { name: pattern, ..terms() });
    assert!(matches!(world.join(workers, "d", 4), Err(JoinError::Name { .. })));
    world.join(workers, "worker-d", 4).unwrap();
}

#[test]
fn only_a_token_for_the_control_plane_gives_its_role() {
    let mut world = World::new();
    for (number, control_plane) in [(1, false), (2, true)] {
        let token = world.token(TokenTerms { control_plane, ..terms() });
        let node = world.join(token, &format!("n{number}"), number).unwrap();
        assert_eq!(world.registry.member(node).unwrap().grant.control_plane, control_plane);
    }
}

#[test]
fn a_wrong_secret_is_refused_before_anything_is_told_about_the_token() {
    let mut world = World::new();
    let token = world.token(terms());
    world.join(token, "a", 1).unwrap();
    let join = Join {
        token,
        secret_hash: SecretHash([8; 32]),
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([2; 32]),
        node_id: NodeId([200; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(JoinError::TokenSecret { .. })), "{refused:?}");
}

#[test]
fn a_join_whose_answer_was_lost_can_be_asked_again() {
    let mut world = World::new();
    let token = world.token(terms());
    let first = world.join(token, "a", 1).unwrap();
    world.advance(Duration::from_secs(7200));
    assert_eq!(world.join(token, "a", 1).unwrap(), first);
    assert_eq!(world.registry.members.len(), 1);
    // A request with another name or key is a different one.
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::TokenUsed { .. })));
    assert!(matches!(world.join(token, "a", 2), Err(JoinError::TokenUsed { .. })));
}

#[test]
fn names_and_keys_are_unique_and_the_holder_learns_who_tried() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    let token = world.token(TokenTerms { uses: 9, ..terms() });
    assert!(matches!(world.join(token, "a", 2), Err(JoinError::NameTaken { .. })));
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::IdentityTaken { .. })));
    let join = Join {
        token,
        secret_hash: SECRET,
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: WireguardKey([0, 1].repeat(16).try_into().unwrap()),
        node_id: NodeId([201; 16]),
    };
    let refused = world.registry.join(&join, &world.sessions, world.now);
    assert!(matches!(refused, Err(JoinError::WireguardKeyTaken { .. })), "{refused:?}");
    assert_eq!(world.problems(node).len(), 2);
    assert_eq!(world.registry.token(token).unwrap().used, 0, "a refused join consumes no use");
}

#[test]
fn a_reinstalled_machine_takes_the_place_of_the_old_node() {
    let mut world = World::new();
    let old = world.node("a", 1, &["10.0.0.0/24"]);
    world.announce(old, 1, "10.0.0.0/24");
    let overlay = |world: &World, node| world.registry.members.get(node).unwrap().grant.overlay;
    let addresses = overlay(&world, old);
    let replace = Some("a".parse::<NodeName>().unwrap());
    let allowed_prefixes = vec![net("10.0.0.0/24")];
    let token = world.token(TokenTerms { replace, allowed_prefixes, ..terms() });
    let new = world.join(token, "a", 2).unwrap();
    assert!(world.is_removed(old));
    assert_eq!(overlay(&world, new), addresses, "files on the machine name them");
    world.open(new);
    assert!(world.announce(new, 1, "10.0.0.0/24").is_empty());
    assert_eq!(world.holder("10.0.0.0/24"), Some(new));
    // Replacing a node that does not exist is an ordinary join.
    let replace = Some("gone".parse::<NodeName>().unwrap());
    let token = world.token(TokenTerms { replace, ..terms() });
    world.join(token, "gone", 3).unwrap();
}

#[test]
fn a_removed_identity_never_joins_again() {
    let mut world = World::new();
    let node = world.node("a", 1, &[]);
    assert_eq!(world.remove(node).node_id, node);
    assert!(world.signed.contains(&Unsigned::Tombstone(node)));
    world.reload();
    let token = world.token(terms());
    assert!(matches!(world.join(token, "b", 1), Err(JoinError::IdentityRemoved { .. })));
    world.join(token, "a", 2).unwrap();
}

#[test]
fn a_wireguard_key_of_a_removed_node_never_joins_again_under_another_identity() {
    let mut world = World::new();
    let with_keys = |world: &mut World, name: &str, identity: u8, wireguard: u8| {
        let token = world.token(TokenTerms {
            replace: Some("a".parse().unwrap()).filter(|_| name == "a"),
            ..terms()
        });
        let join = Join {
            token,
            secret_hash: SECRET,
            name: name.parse().unwrap(),
            identity_key: identity_key(identity),
            wireguard_key: WireguardKey([wireguard; 32]),
            node_id: NodeId([identity; 16]),
        };
        let joined = world.registry.join(&join, &world.sessions, world.now);
        world.commit();
        joined
    };
    let node = with_keys(&mut world, "b", 1, 7).unwrap();
    let tombstone = world.remove(node);
    assert_eq!(tombstone.wireguard_keys, [WireguardKey([7; 32])]);
    world.reload();
    let refused = with_keys(&mut world, "c", 2, 7);
    let name = "b".parse().unwrap();
    assert_eq!(refused, Err(JoinError::WireguardKeyRemoved { name }));
    with_keys(&mut world, "c", 2, 8).unwrap();

    // Nor does that of a node that is replaced, which is removed then.
    with_keys(&mut world, "a", 3, 9).unwrap();
    let refused = with_keys(&mut world, "a", 4, 9);
    assert!(matches!(refused, Err(JoinError::WireguardKeyTaken { .. })), "{refused:?}");
    with_keys(&mut world, "a", 4, 10).unwrap();
    let refused = with_keys(&mut world, "a", 5, 9);
    assert!(matches!(refused, Err(JoinError::WireguardKeyRemoved { .. })), "{refused:?}");

    // A store that lost the removal learns of the key from the nodes, with the tombstone.
    let mut empty = World::new();
    assert_eq!(empty.registry.resync(vec![tombstone], &empty.sessions, empty.now), 1);
    empty.commit();
    let refused = with_keys(&mut empty, "c", 2, 7);
    assert!(matches!(refused, Err(JoinError::WireguardKeyRemoved { .. })), "{refused:?}");
}

#[test]
fn a_replica_refuses_the_wireguard_key_of_a_node_that_another_controller_removed() {
    let mut world = World::new();
    let node = world.node("a", 7, &[]);
    let token = world.token(terms());
    let mut replica = Registry::load(world.stored.contents(world.now)).unwrap();
    let before = world.stored.clone();
    let tombstone = world.remove(node);
    replica.refresh(world.stored.since(&before, world.now)).unwrap();
    let mut join = Join {
        token,
        secret_hash: SECRET,
        name: "b".parse().unwrap(),
        identity_key: identity_key(2),
        wireguard_key: tombstone.wireguard_keys[0],
        node_id: NodeId([2; 16]),
    };
    let refused = replica.join(&join, &world.sessions, world.now);
    assert_eq!(refused, Err(JoinError::WireguardKeyRemoved { name: "a".parse().unwrap() }));
    join.wireguard_key = WireguardKey([2; 32]);
    join.identity_key = tombstone.identity_key;
    let refused = replica.join(&join, &world.sessions, world.now);
    assert_eq!(refused, Err(JoinError::IdentityRemoved { name: "a".parse().unwrap() }));
    join.identity_key = identity_key(2);
    assert_eq!(replica.join(&join, &world.sessions, world.now), Ok(join.node_id));
}
