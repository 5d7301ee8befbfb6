//! Places of the endpoint's clients: which user may take one.

use std::collections::BTreeMap;

/// Largest number of clients at the same time; further ones are closed at once. A node has about ten. With 16 KiB
/// of buffers each they take 8 MiB.
const CLIENTS: usize = 512;
/// Largest number of clients that are not root's. The kubelet and kube-proxy are: other users leave them places.
const OTHERS: usize = 384;
/// Largest number of clients of one user other than root.
const OF_USER: usize = 64;
/// User id of root.
const ROOT: u32 = 0;

/// User of a client; `None` if the kernel does not tell.
pub(super) type User = Option<u32>;

/// Number of clients of each user.
#[derive(Debug, Default)]
pub(super) struct Places {
    taken: BTreeMap<User, usize>,
}

impl Places {
    /// Takes a place for a client of a user. Returns whether there is one; if so, [`Self::release`] has to be called
    /// in the end.
    pub(super) fn take(&mut self, user: User) -> bool {
        let total = self.count();
        let others = total - self.of(Some(ROOT));
        let may = match user {
            Some(ROOT) => true,
            Some(_) => others < OTHERS && self.of(user) < OF_USER,
            None => others < OTHERS,
        };
        let has_place = may && total < CLIENTS;
        if has_place {
            *self.taken.entry(user).or_default() += 1;
        }
        has_place
    }

    /// Gives the place of a client of a user back.
    pub(super) fn release(&mut self, user: User) {
        let Some(count) = self.taken.get_mut(&user) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.taken.remove(&user);
        }
    }

    /// Returns the number of clients.
    pub(super) fn count(&self) -> usize {
        self.taken.values().sum()
    }

    fn of(&self, user: User) -> usize {
        self.taken.get(&user).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes places for a user until there is none, and returns how many there were.
    fn fill(places: &mut Places, user: User) -> usize {
        (0..1_000).filter(|_| places.take(user)).count()
    }

    #[test]
    fn one_user_leaves_places_to_others_and_all_of_them_leave_some_to_root() {
        let mut places = Places::default();
        assert_eq!(fill(&mut places, Some(1_000)), OF_USER);
        assert_eq!(fill(&mut places, Some(1_001)), OF_USER, "another user has as many");
        let rest: usize = (2_000..2_100).map(|user| fill(&mut places, Some(user))).sum();
        assert_eq!(rest, OTHERS - 2 * OF_USER);
        assert_eq!(fill(&mut places, None), 0);
        assert_eq!(fill(&mut places, Some(ROOT)), CLIENTS - OTHERS);
        assert_eq!(places.count(), CLIENTS);
        places.release(Some(1_000));
        assert!(places.take(Some(3_000)), "a place that was given back");
    }

    #[test]
    fn clients_of_unknown_users_share_what_users_other_than_root_have() {
        let mut places = Places::default();
        assert_eq!(fill(&mut places, None), OTHERS);
        assert_eq!(fill(&mut places, Some(1_000)), 0);
        for _ in 0..OTHERS {
            places.release(None);
        }
        assert_eq!(places.count(), 0);
        assert_eq!(fill(&mut places, Some(ROOT)), CLIENTS);
        assert!(!places.take(None));
    }
}
