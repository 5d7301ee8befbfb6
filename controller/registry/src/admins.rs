//! Keys of administrators. A certificate gives access only while its key is in this list and is not revoked,
//! so a certificate that was copied can be made useless at once.

use towline_types::id::IdentityKey;

use super::{CreateAdminError, Event, Key, NoSuchAdmin, Now, Registry};

/// Largest number of keys, including revoked ones.
const ADMINS: usize = 256;
/// Largest number of valid keys of operators. Those of controllers always have a place.
const CREATED_ADMINS: usize = 64;
/// Largest number of valid keys of controllers. One without a permanent state directory adds a key at each start, and
/// few run at a time: a start displaces the key of one that ended long ago.
const LOCAL_ADMINS: usize = 32;
/// Time in seconds for which a revoked key is still listed. Its certificates have expired by then, and a key
/// that is not listed gives no access.
const REVOKED_KEPT: i64 = 30 * 24 * 3600;

/// Name of the administrator whose credential is in a controller's state directory. No operator's has it.
pub const LOCAL_ADMIN: &str = "local";

/// Key of an administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Public key of the administrator's certificates.
    pub key: IdentityKey,
    /// Name of the administrator. Several keys may have the same one.
    pub name: String,
    /// Time at which the key was added, in seconds since 1970.
    pub created_at: i64,
    /// Time at which the key was revoked, in seconds since 1970; `None` while it is valid.
    pub revoked_at: Option<i64>,
}

impl Admin {
    /// Returns whether the key is the one of a controller's state directory.
    fn is_local(&self) -> bool {
        self.name == LOCAL_ADMIN
    }
}

impl Registry {
    /// Adds the key of an administrator. Does nothing if the key is listed, also if it is revoked. If there are
    /// too many keys, the oldest one is deleted; too many of controllers displace no key of an operator.
    pub fn add_admin(&mut self, key: IdentityKey, name: &str, now: Now) {
        if self.admins.contains_key(&key) {
            return;
        }
        if name == LOCAL_ADMIN {
            self.displace(LOCAL_ADMINS, |admin| admin.revoked_at.is_none() && admin.is_local());
        }
        self.displace(ADMINS, |_| true);
        let admin = Admin { key, name: name.to_owned(), created_at: now.unix, revoked_at: None };
        self.admins.insert(key, admin);
        self.dirty.insert(Key::Admin(key));
        self.events.push(Event::AdminAdded { name: name.to_owned(), key });
    }

    /// Makes room for one more key among the `most` keys that `is_counted` selects. Revoked keys are deleted first,
    /// then those of controllers; the oldest ones first.
    fn displace(&mut self, most: usize, is_counted: impl Fn(&Admin) -> bool) {
        let counted = self.admins.values().filter(|admin| is_counted(admin));
        let order = |admin: &Admin| {
            (admin.revoked_at.is_none(), !admin.is_local(), admin.created_at, admin.key)
        };
        let mut counted: Vec<_> = counted.map(order).collect();
        counted.sort_unstable();
        let surplus = (counted.len() + 1).saturating_sub(most);
        for (.., key) in counted.into_iter().take(surplus) {
            self.admins.remove(&key);
            self.dirty.insert(Key::Admin(key));
        }
    }

    /// Adds the key of an administrator for an operator. Does nothing if the administrator with this name has the
    /// key. Unlike [`Self::add_admin`] it displaces no valid key.
    pub fn create_admin(
        &mut self,
        key: IdentityKey,
        name: &str,
        now: Now,
    ) -> Result<(), CreateAdminError> {
        match self.admins.get(&key) {
            Some(admin) if admin.revoked_at.is_some() => {
                return Err(CreateAdminError::Revoked { key });
            }
            Some(admin) if admin.name != name => return Err(CreateAdminError::OtherName { key }),
            Some(_) => return Ok(()),
            None => {}
        }
        let is_operators = |admin: &&Admin| admin.revoked_at.is_none() && !admin.is_local();
        if self.admins.values().filter(is_operators).count() >= CREATED_ADMINS {
            return Err(CreateAdminError::TooMany);
        }
        self.add_admin(key, name, now);
        Ok(())
    }

    /// Revokes the key of an administrator. Revoking it again is not an error.
    pub fn revoke_admin(&mut self, key: IdentityKey, now: Now) -> Result<(), NoSuchAdmin> {
        let admin = self.admins.get_mut(&key).ok_or(NoSuchAdmin { key })?;
        if admin.revoked_at.is_none() {
            admin.revoked_at = Some(now.unix);
            let name = admin.name.clone();
            self.dirty.insert(Key::Admin(key));
            self.events.push(Event::AdminRevoked { name, key });
        }
        Ok(())
    }

    /// Returns the key of an administrator, with what is known of it.
    pub fn admin(&self, key: IdentityKey) -> Option<&Admin> {
        self.admins.get(&key)
    }

    /// Returns all keys of administrators, sorted.
    pub fn admins(&self) -> impl Iterator<Item = &Admin> {
        self.admins.values()
    }

    /// Deletes keys that were revoked long ago.
    pub(super) fn delete_old_admins(&mut self, now: Now) {
        let is_old = |at: i64| now.unix.saturating_sub(at) > REVOKED_KEPT;
        let old: Vec<IdentityKey> = self
            .admins
            .values()
            .filter(|admin| admin.revoked_at.is_some_and(is_old))
            .map(|admin| admin.key)
            .collect();
        for key in old {
            self.admins.remove(&key);
            self.dirty.insert(Key::Admin(key));
        }
    }
}
