//! Keys of administrators.

use std::time::Duration;

use towline_types::id::IdentityKey;

use super::World;
use crate::{Admin, CreateAdminError, Key, LOCAL_ADMIN, NoSuchAdmin, Starts};

fn key(number: u8) -> IdentityKey {
    IdentityKey([number; 32])
}

#[test]
fn a_revoked_key_stays_revoked_and_is_forgotten_in_the_end() {
    let mut world = World::new();
    world.registry.add_admin(key(1), "local", world.now);
    assert_eq!(world.registry.revoke_admin(key(2), world.now), Err(NoSuchAdmin { key: key(2) }));
    world.registry.revoke_admin(key(1), world.now).unwrap();
    world.registry.add_admin(key(1), "local", world.now);
    let revoked_at = |world: &World| world.registry.admin(key(1)).map(|admin| admin.revoked_at);
    assert_eq!(revoked_at(&world), Some(Some(world.now.unix)));

    let begun = world.now;
    world.registry.tick(&world.sessions, begun.plus(Duration::from_secs(29 * 24 * 3600)));
    assert!(revoked_at(&world).is_some());
    world.registry.tick(&world.sessions, begun.plus(Duration::from_secs(31 * 24 * 3600)));
    assert_eq!(revoked_at(&world), None);
    assert!(world.registry.take_changes().records.contains(&Key::Admin(key(1))));
}

#[test]
fn a_restored_backup_revokes_every_key() {
    let mut world = World::new();
    world.registry.add_admin(key(1), "local", world.now);
    world.registry.start(None, world.now);
    assert!(world.registry.admin(key(1)).unwrap().revoked_at.is_none());
    let ahead = Starts { count: 100, epoch: 1 };
    assert!(world.registry.start(Some(ahead), world.now).restored);
    assert!(world.registry.admin(key(1)).unwrap().revoked_at.is_some());
}

#[test]
fn the_number_of_keys_is_bounded_and_a_revoked_one_goes_first() {
    let mut world = World::new();
    for number in 0..=255 {
        world.registry.add_admin(key(number), "a", world.now);
    }
    world.registry.revoke_admin(key(9), world.now).unwrap();
    world.registry.add_admin(IdentityKey(std::array::from_fn(|index| index as u8)), "b", world.now);
    assert_eq!(world.registry.admins().count(), 256);
    assert!(world.registry.admin(key(9)).is_none());
}

#[test]
fn the_number_of_administrators_is_bounded_and_none_is_displaced() {
    let mut world = World::new();
    world.registry.add_admin(key(255), "local", world.now);
    let created = (0..255)
        .filter(|number| world.registry.create_admin(key(*number), "anna", world.now).is_ok());
    assert_eq!(created.count(), 64);
    let again = world.registry.create_admin(key(0), "anna", world.now);
    assert_eq!(again, Ok(()), "a new certificate for a key that is listed");
    let refused = world.registry.create_admin(key(100), "anna", world.now);
    assert_eq!(refused, Err(CreateAdminError::TooMany));
    let other = world.registry.create_admin(key(255), "anna", world.now);
    assert_eq!(other, Err(CreateAdminError::OtherName { key: key(255) }));
    world.registry.revoke_admin(key(0), world.now).unwrap();
    let revoked = world.registry.create_admin(key(0), "anna", world.now);
    assert_eq!(revoked, Err(CreateAdminError::Revoked { key: key(0) }));
    assert_eq!(world.registry.create_admin(key(100), "ben", world.now), Ok(()));
    assert!(world.registry.admin(key(255)).is_some_and(|admin| admin.revoked_at.is_none()));
}

#[test]
fn controllers_that_start_without_a_state_displace_no_operator() {
    let mut world = World::new();
    let operators: Vec<IdentityKey> = (0..64).map(key).collect();
    for operator in &operators {
        world.registry.create_admin(*operator, "anna", world.now).unwrap();
    }
    let is_valid = |world: &World, key: &IdentityKey| {
        world.registry.admin(*key).is_some_and(|admin| admin.revoked_at.is_none())
    };
    let started =
        |number: u16| IdentityKey([number.to_be_bytes(); 16].concat().try_into().unwrap());
    for number in 1000..1600 {
        world.now = world.now.plus(Duration::from_secs(60));
        world.registry.add_admin(started(number), LOCAL_ADMIN, world.now);
        world.commit();
    }
    assert!(operators.iter().all(|operator| is_valid(&world, operator)));
    assert!((1568..1600).all(|number| is_valid(&world, &started(number))));
    assert_eq!(world.registry.admins().count(), 64 + 32);
    assert_eq!(world.stored.admins.len(), 64 + 32);

    // An earlier version let them fill the list.
    for number in 1100..1260 {
        let created_at = world.now.unix;
        let (key, name) = (started(number), LOCAL_ADMIN.to_owned());
        let admin = Admin { key, name, created_at, revoked_at: None };
        world.stored.admins.insert(key, admin);
    }
    world.reload();
    assert_eq!(world.registry.admins().count(), 256);
    world.registry.add_admin(started(2000), LOCAL_ADMIN, world.now);
    assert!(operators.iter().all(|operator| is_valid(&world, operator)));
    assert_eq!(world.registry.admins().count(), 64 + 32);
}
