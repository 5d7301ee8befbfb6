//! The invariants, under random operations.

use proptest::prelude::*;

use super::*;

/// A random operation. Numbers select one of the existing nodes or tokens.
#[derive(Debug, Clone)]
enum Action {
    Token { uses: u32, replace: Option<u8>, ephemeral: bool, prefixes: Vec<u8> },
    Join { token: usize, name: u8, key: u8 },
    Open(usize),
    Close(usize),
    Publish { node: usize, prefixes: Vec<u8>, ahead: u64 },
    Remove(usize),
    Revoke(usize),
    Advance(u64),
    Restart,
}

fn action() -> impl Strategy<Value = Action> {
    let prefixes = || prop::collection::vec(0u8..6, 0..3);
    prop_oneof![
        (1u32..3, prop::option::of(0u8..5), any::<bool>(), prefixes()).prop_map(
            |(uses, replace, ephemeral, prefixes)| Action::Token {
                uses: if replace.is_some() { 1 } else { uses },
                replace,
                ephemeral,
                prefixes
            }
        ),
        (any::<usize>(), 0u8..5, 1u8..12).prop_map(|(token, name, key)| Action::Join {
            token,
            name,
            key
        }),
        any::<usize>().prop_map(Action::Open),
        any::<usize>().prop_map(Action::Close),
        (any::<usize>(), prefixes(), 0u64..3).prop_map(|(node, prefixes, ahead)| Action::Publish {
            node,
            prefixes,
            ahead
        }),
        any::<usize>().prop_map(Action::Remove),
        any::<usize>().prop_map(Action::Revoke),
        (1u64..900).prop_map(Action::Advance),
        Just(Action::Restart),
    ]
}

fn choice(number: u8) -> IpNet {
    let texts =
        ["10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "fd12::/32"];
    net(texts[usize::from(number) % texts.len()])
}

fn pick<T: Copy>(items: &[T], number: usize) -> Option<T> {
    (!items.is_empty()).then(|| items[number % items.len()])
}

impl World {
    fn apply_action(&mut self, action: &Action) {
        let nodes: Vec<NodeId> =
            self.registry.members().map(|member| member.grant.node_id).collect();
        let tokens: Vec<TokenId> = self.registry.tokens.keys().copied().collect();
        match action {
            Action::Token { uses, replace, ephemeral, prefixes } => {
                self.token(TokenTerms {
                    uses: *uses,
                    replace: replace.map(|name| format!("n{name}").parse().unwrap()),
                    ephemeral: *ephemeral,
                    allowed_prefixes: prefixes.iter().map(|number| choice(*number)).collect(),
                    pod_ranges: PodRange::new(net("10.0.0.0/8"), 16, *uses, Vec::new())
                        .into_iter()
                        .collect(),
                    ..terms()
                });
            }
            Action::Join { token, name, key } => {
                if let Some(token) = pick(&tokens, *token) {
                    let _ = self.join(token, &format!("n{name}"), u16::from(*key));
                }
            }
            Action::Open(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.open(node);
                }
            }
            Action::Close(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.close(node);
                }
            }
            Action::Publish { node, prefixes, ahead } => {
                if let Some(node) = pick(&nodes, *node) {
                    let member = self.registry.member(node).unwrap();
                    let have = member.record.as_ref().map_or(0, |record| record.generation);
                    let prefixes: Vec<IpNet> = prefixes.iter().map(|n| choice(*n)).collect();
                    let _ = self.publish(node, have + ahead, &prefixes);
                }
            }
            Action::Remove(node) => {
                if let Some(node) = pick(&nodes, *node) {
                    self.remove(node);
                }
            }
            Action::Revoke(token) => {
                if let Some(token) = pick(&tokens, *token) {
                    self.registry.revoke_token(token).unwrap();
                    self.commit();
                }
            }
            Action::Advance(seconds) => self.advance(Duration::from_secs(*seconds)),
            Action::Restart => {
                self.reload();
                self.sessions = Sessions::new(Duration::from_secs(1));
            }
        }
    }

    fn check(&self) {
        let registry = &self.registry;
        let grants: Vec<_> = registry.members().map(|member| &member.grant).collect();
        let unique = |count: usize| assert_eq!(count, grants.len());
        unique(grants.iter().map(|g| &g.name).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| &g.identity_key).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.wireguard_keys[0]).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v4).collect::<BTreeSet<_>>().len());
        unique(grants.iter().map(|g| g.overlay.v6).collect::<BTreeSet<_>>().len());
        for grant in &grants {
            assert!(!registry.removed_identities.contains_key(&grant.identity_key));
            assert!(!registry.removed_wireguard_keys.contains_key(&grant.wireguard_keys[0]));
            assert!(registry.mesh().config.overlay_v4.contains(&grant.overlay.v4));
            assert!(registry.mesh().config.overlay_v6.contains(&grant.overlay.v6));
        }

        // Announced prefixes in the map overlap only if the grant of the nested one names it.
        let mut announced = Vec::new();
        for member in registry.members() {
            let Some(record) = &member.record else { continue };
            for prefix in record.prefixes.iter().filter(|p| !member.withheld.contains(p)) {
                announced.push((*prefix, &member.grant));
                assert_eq!(registry.claims.holder(prefix), Some(member.grant.node_id));
            }
        }
        for (i, (a, of_a)) in announced.iter().enumerate() {
            for (b, of_b) in &announced[i + 1..] {
                if of_a.node_id == of_b.node_id || !(a.contains(b) || b.contains(a)) {
                    continue;
                }
                assert_ne!(a, b);
                let (nested, of) = if a.contains(b) { (b, of_b) } else { (a, of_a) };
                assert!(of.allowed_prefixes.contains(nested), "{a} and {b}");
            }
        }

        // What is stored is what is in the registry, and everything that the CA must sign was given
        // out to be signed.
        let mut revisions = BTreeSet::from([registry.mesh().revision]);
        let mut count = 1;
        for member in registry.members() {
            let id = member.grant.node_id;
            let stored = self.stored.members[&id].clone();
            assert_eq!(Member { known_since: member.known_since, ..stored }, *member);
            assert!(self.signed.contains(&Unsigned::Grant(id)));
            revisions.insert(member.revision);
            count += 1;
        }
        for removed in registry.removed_nodes() {
            let id = removed.tombstone.node_id;
            assert_eq!(self.stored.removed_nodes.get(&id), Some(removed));
            assert!(self.signed.contains(&Unsigned::Tombstone(id)));
            revisions.insert(removed.revision);
            count += 1;
        }
        assert_eq!(self.stored.members.len(), registry.members.len());
        assert!(registry.tokens().eq(self.stored.tokens.values()));
        assert_eq!(self.stored.counters, registry.counters());
        assert_eq!(revisions.len(), count, "each change has its own revision");
        assert!(revisions.last().is_none_or(|last| *last <= registry.counters().revision));
        let loaded = Registry::load(self.stored.contents(self.now)).unwrap();
        for node in registry.members().map(|member| member.grant.node_id) {
            assert_eq!(loaded.claims.held_by(node), registry.claims.held_by(node));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_whatever_happens(actions in prop::collection::vec(action(), 1..60)) {
        let mut world = World::new();
        let mut known: BTreeSet<NodeId> = BTreeSet::new();
        let mut revision = 0;
        for action in &actions {
            world.apply_action(action);
            world.check();
            prop_assert!(world.registry.counters().revision >= revision);
            revision = world.registry.counters().revision;
            known.extend(world.registry.members().map(|member| member.grant.node_id));
            for node in &known {
                let there = world.registry.members.contains(*node);
                let removed = world.registry.removed_nodes.contains_key(node);
                prop_assert!(there != removed, "only a tombstone removes a node");
            }
        }
    }

    #[test]
    fn a_replica_that_applies_each_change_has_what_one_that_loads_all_has(
        actions in prop::collection::vec(action(), 1..60),
        every in 1usize..5,
    ) {
        let mut world = World::new();
        let mut replica = Registry::load(world.stored.contents(world.now)).unwrap();
        let mut before = world.stored.clone();
        for (step, action) in actions.iter().enumerate() {
            world.apply_action(action);
            // Several changes may come at once.
            if step % every != 0 && step + 1 < actions.len() {
                continue;
            }
            let contents = world.stored.contents(world.now);
            replica.refresh(world.stored.since(&before, world.now)).unwrap();
            before = world.stored.clone();
            let loaded = Registry::load(contents).unwrap();
            prop_assert_eq!(replica.counters(), loaded.counters());
            prop_assert_eq!(replica.mesh(), loaded.mesh());
            let members = |registry: &Registry| -> Vec<Member> {
                let of = |member: &Member| Member { known_since: world.now.mono, ..member.clone() };
                registry.members().map(of).collect()
            };
            prop_assert_eq!(members(&replica), members(&loaded));
            prop_assert!(replica.removed_nodes().eq(loaded.removed_nodes()));
            prop_assert!(replica.removed_identities == loaded.removed_identities);
            prop_assert!(replica.removed_wireguard_keys == loaded.removed_wireguard_keys);
            prop_assert!(replica.tokens().eq(loaded.tokens()));
            for member in loaded.members() {
                let node = member.grant.node_id;
                prop_assert_eq!(replica.claims.held_by(node), loaded.claims.held_by(node));
            }
            for removed in loaded.removed_nodes() {
                prop_assert!(replica.claims.held_by(removed.tombstone.node_id).is_empty());
            }
            let changes = replica.take_changes();
            prop_assert!(changes.records.is_empty() && changes.unsigned.is_empty());
        }
    }

    #[test]
    fn an_emptied_store_gets_back_exactly_the_nodes_that_were_there(
        actions in prop::collection::vec(action(), 1..60),
        first in any::<usize>(),
    ) {
        let mut world = World::new();
        let mut grants = BTreeMap::new();
        for action in &actions {
            world.apply_action(action);
            let members = world.registry.members().map(|member| &member.grant);
            grants.extend(members.map(|grant| (grant.node_id, grant.clone())));
        }
        let there: BTreeSet<NodeId> =
            world.registry.members().map(|member| member.grant.node_id).collect();
        let tombstones: Vec<Tombstone> =
            world.registry.removed_nodes().map(|removed| removed.tombstone.clone()).collect();
        // Nodes that were removed try it too, before anyone returns their tombstones.
        let mut grants: Vec<_> = grants.into_values().collect();
        if !grants.is_empty() {
            let first = first % grants.len();
            grants.rotate_left(first);
        }
        let mut empty = World::new();
        empty.now = world.now;
        let readmit = |world: &mut World| {
            for grant in &grants {
                // Another node may be in the way until its tombstone arrives.
                let _ = world.registry.readmit(grant.clone(), world.now);
            }
            world.commit();
            world.check();
        };
        readmit(&mut empty);
        empty.registry.resync(tombstones, &empty.sessions, empty.now);
        empty.commit();
        readmit(&mut empty);
        let back: BTreeSet<NodeId> =
            empty.registry.members().map(|member| member.grant.node_id).collect();
        prop_assert_eq!(back, there);
    }
}
