//! A place for what a kernel derives from a weight (a packed, transformed or rotated copy), and a bound on all of them
//! together.

use std::any::{Any, TypeId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The bound that holds until [`set_pack_memory`] is called: 256 MiB.
pub const DEFAULT_PACK_MEMORY: usize = 256 << 20;

/// Sets what the packed weights of this process may take together, in bytes; 0 keeps none.
///
/// A kernel that finds no packed copy brings the weight into order in every call. The sums are the same, in the same
/// order: no result depends on this number. What is held beyond a lower bound is let go at once.
pub fn set_pack_memory(bytes: usize) {
    LEDGER.set_bound(bytes);
}

/// What packed weights take now, in bytes.
pub fn packed_memory() -> usize {
    lock(&LEDGER.0).used
}

/// Holds what a kernel derives from one weight, beside that weight.
///
/// It is no tensor and no parameter: a module's record, its optimizer and its files never see it. A kernel asks
/// for its packed form with [`get_or_pack`](Self::get_or_pack); the answer is made anew when the weight is no
/// longer the one that it was made from, so that an optimizer step or a merged adapter can never meet stale
/// packing. Clones share the entries: cloned modules share their weights too.
///
/// All caches of a process share one bound, [`set_pack_memory`].
#[derive(Clone)]
pub struct WeightCache {
    slots: Arc<Slots>,
    ledger: &'static Ledger,
}

/// At most one for each type of packed value.
type Slots = Mutex<Vec<Slot>>;

struct Slot {
    of: TypeId,
    /// Where the weight lay that was asked for last.
    address: usize,
    packed: Option<Packed>,
}

struct Packed {
    /// Tells whether a weight is the one that this was made from.
    key: Box<dyn Any + Send + Sync>,
    value: Arc<dyn Any + Send + Sync>,
    reservation: Reservation,
}

/// What a packed copy of a weight takes and saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Where the weight lies.
    pub address: usize,
    /// What the copy takes.
    pub bytes: usize,
    /// How often one call would make each byte of it, if it were not kept. Where memory is short, those with more stay.
    pub uses: usize,
}

impl Default for WeightCache {
    fn default() -> Self {
        Self { slots: Arc::default(), ledger: &LEDGER }
    }
}

impl std::fmt::Debug for WeightCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_filled() { "WeightCache(filled)" } else { "WeightCache(empty)" })
    }
}

impl WeightCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of type `V` packed from the weight that `key` identifies, which is packed now if it is not there.
    ///
    /// `None` where that is not worth it: the weight is met for the first time, which may be the only time, or the bound
    /// leaves no room for it.
    ///
    /// `key` is kept beside the value, so it should hold on to the weight's storage (an address alone could be used again by
    /// another weight); `same` compares the kept key with the weight at hand.
    pub fn get_or_pack<K, V>(
        &self,
        key: K,
        same: impl FnOnce(&K, &K) -> bool,
        packing: Packing,
        pack: impl FnOnce() -> V,
    ) -> Option<Arc<V>>
    where
        K: Any + Send + Sync,
        V: Any + Send + Sync,
    {
        let of = TypeId::of::<V>();
        {
            let mut slots = lock(&self.slots);
            let Some(slot) = slots.iter_mut().find(|slot| slot.of == of) else {
                slots.push(Slot { of, address: packing.address, packed: None });
                return None;
            };
            if let Some(packed) = &slot.packed {
                if packed.key.downcast_ref().is_some_and(|kept| same(kept, &key)) {
                    return packed.value.clone().downcast().ok();
                }
                slot.packed = None;
            }
            // an address may be another weight's by now: then this packs too early, but never wrongly
            if std::mem::replace(&mut slot.address, packing.address) != packing.address {
                return None;
            }
        }
        // Packing may use all threads, and this one may be given other work meanwhile that asks for the same: no lock is held.
        let reservation = self.ledger.reserve(packing, &self.slots)?;
        let value = Arc::new(pack());
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.iter_mut().find(|slot| slot.of == of)
            && reservation.holds()
        {
            slot.packed = Some(Packed { key: Box::new(key), value: value.clone(), reservation });
        }
        Some(value)
    }

    /// Forgets the packed values and frees their memory.
    pub fn clear(&self) {
        lock(&self.slots).clear();
    }

    /// Whether a packed value is held.
    pub fn is_filled(&self) -> bool {
        lock(&self.slots).iter().any(|slot| slot.packed.is_some())
    }
}

static LEDGER: Ledger = Ledger::new(DEFAULT_PACK_MEMORY);

/// What caches hold together. Its lock may be taken while that of a cache's slots is held, never the other way round.
struct Ledger(Mutex<Books>);

struct Books {
    bound: usize,
    used: usize,
    holders: Vec<Holder>,
    next: u64,
}

/// A packed value, and where it is held.
struct Holder {
    id: u64,
    packing: Packing,
    slots: Weak<Slots>,
}

impl Ledger {
    const fn new(bound: usize) -> Self {
        Self(Mutex::new(Books { bound, used: 0, holders: Vec::new(), next: 0 }))
    }

    fn set_bound(&self, bytes: usize) {
        let let_go = {
            let mut books = lock(&self.0);
            books.bound = bytes;
            books.make_room(0, usize::MAX)
        };
        let_go.into_iter().for_each(Holder::let_go);
    }

    /// Room for a value, at the expense of those that save less if need be.
    fn reserve(&'static self, packing: Packing, slots: &Arc<Slots>) -> Option<Reservation> {
        let (id, let_go) = {
            let mut books = lock(&self.0);
            let let_go = books.make_room(packing.bytes, packing.uses);
            if books.beyond(packing.bytes) > 0 {
                return None;
            }
            let id = books.next;
            books.next += 1;
            books.used += packing.bytes;
            books.holders.push(Holder { id, packing, slots: Arc::downgrade(slots) });
            (id, let_go)
        };
        let_go.into_iter().for_each(Holder::let_go);
        Some(Reservation { id, ledger: self })
    }
}

impl Books {
    /// By how much the bound would be passed with `bytes` more.
    fn beyond(&self, bytes: usize) -> usize {
        self.used.saturating_add(bytes).saturating_sub(self.bound)
    }

    /// Takes out values that save less than `uses`, the least first, until `bytes` fit; none if that is not enough.
    fn make_room(&mut self, bytes: usize, uses: usize) -> Vec<Holder> {
        let beyond = self.beyond(bytes);
        if beyond == 0 {
            return Vec::new();
        }
        self.holders.sort_by_key(|holder| holder.packing.uses);
        let lesser = self.holders.iter().take_while(|holder| holder.packing.uses < uses);
        let freed = lesser.scan(0, |freed, holder| {
            *freed += holder.packing.bytes;
            Some(*freed)
        });
        let Some((last, freed)) = freed.enumerate().find(|(_, freed)| *freed >= beyond) else {
            return Vec::new();
        };
        self.used -= freed;
        self.holders.drain(..=last).collect()
    }
}

impl Holder {
    /// Drops the value, which the books no longer have.
    fn let_go(self) {
        let Some(slots) = self.slots.upgrade() else { return };
        for slot in lock(&slots).iter_mut() {
            slot.packed.take_if(|packed| packed.reservation.id == self.id);
        }
    }
}

/// Bytes that the books have for a value, until this is dropped.
struct Reservation {
    id: u64,
    ledger: &'static Ledger,
}

impl Reservation {
    /// Whether the books have it still: another may have taken its place.
    fn holds(&self) -> bool {
        lock(&self.ledger.0).holders.iter().any(|holder| holder.id == self.id)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut books = lock(&self.ledger.0);
        if let Some(at) = books.holders.iter().position(|holder| holder.id == self.id) {
            books.used -= books.holders.swap_remove(at).packing.bytes;
        }
    }
}

/// No lock here is held while something half-made could be left behind, so a poisoned one guards a sound state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ledger of its own, so that tests do not meet.
    fn ledger(bound: usize) -> &'static Ledger {
        Box::leak(Box::new(Ledger::new(bound)))
    }

    fn used(ledger: &Ledger) -> usize {
        lock(&ledger.0).used
    }

    fn cache(ledger: &'static Ledger) -> WeightCache {
        WeightCache { slots: Arc::default(), ledger }
    }

    /// Asks for a weight, which its number stands for; the answer is that number.
    fn ask(cache: &WeightCache, weight: u32, bytes: usize, uses: usize) -> Option<u32> {
        let packing = Packing { address: weight as usize, bytes, uses };
        cache.get_or_pack(weight, |a, b| a == b, packing, || weight).map(|packed| *packed)
    }

    /// Asks until it is packed, which is the second time at most.
    fn pack(cache: &WeightCache, weight: u32, bytes: usize, uses: usize) -> bool {
        ask(cache, weight, bytes, uses);
        ask(cache, weight, bytes, uses);
        cache.is_filled()
    }

    #[test]
    fn a_weight_is_packed_when_it_is_met_again_and_anew_when_it_is_another() {
        let cache = cache(ledger(100));
        let mut packed = 0;
        for (key, found, expected) in [
            (1_u32, false, 0),
            (1, true, 1),
            (1, true, 1),
            (2, false, 1),
            (2, true, 2),
            (1, false, 2),
            (2, false, 2),
        ] {
            let packing = Packing { address: key as usize, bytes: 10, uses: 1 };
            let value = cache.get_or_pack(key, |a, b| a == b, packing, || packed += 1);
            assert_eq!((value.is_some(), packed), (found, expected));
        }
        assert!(!cache.is_filled());
        assert!(pack(&cache, 1, 10, 1) && cache.clone().is_filled());
        cache.clear();
        assert!(!cache.is_filled());
        assert_eq!(used(cache.ledger), 0);
    }

    #[test]
    fn another_type_of_value_has_a_place_of_its_own() {
        let cache = cache(ledger(100));
        let packing = Packing { address: 1, bytes: 10, uses: 1 };
        for _ in 0..2 {
            cache.get_or_pack(1_u32, |a, b| a == b, packing, || 1_u8);
            cache.get_or_pack(1_u32, |a, b| a == b, packing, || "text");
        }
        let unreachable = || -> u8 { unreachable!("it is there") };
        assert_eq!(cache.get_or_pack(1_u32, |a, b| a == b, packing, unreachable).as_deref(), Some(&1));
        assert_eq!(cache.get_or_pack(1_u32, |a, b| a == b, packing, || "other").as_deref(), Some(&"text"));
        assert_eq!(used(cache.ledger), 20);
    }

    #[test]
    fn what_is_held_stays_within_the_bound_and_is_given_back() {
        let ledger = ledger(100);
        let caches: Vec<_> = (0..4).map(|_| cache(ledger)).collect();
        let filled = |weight: u32| pack(&caches[weight as usize], weight, 40, 1);
        assert_eq!([0, 1, 2].map(filled), [true, true, false]);
        assert_eq!(used(ledger), 80);
        drop(caches[0].clone());
        assert_eq!(used(ledger), 80, "one of two clones was dropped");
        let mut caches = caches;
        caches.remove(0);
        assert_eq!(used(ledger), 40);
        assert!(pack(&caches[1], 2, 40, 1), "there is room now");
        assert!(!pack(&caches[2], 3, 101, 9), "larger than the bound");
        ledger.set_bound(40);
        assert_eq!(used(ledger), 40);
        ledger.set_bound(0);
        assert_eq!(used(ledger), 0);
        assert!(caches.iter().all(|cache| !cache.is_filled()));
    }

    #[test]
    fn where_memory_is_short_those_stay_that_save_most() {
        let ledger = ledger(100);
        let caches: Vec<_> = (0..5).map(|_| cache(ledger)).collect();
        let filled = || caches.iter().map(WeightCache::is_filled).collect::<Vec<_>>();
        assert!(pack(&caches[0], 0, 40, 3) && pack(&caches[1], 1, 40, 1));
        assert!(!pack(&caches[2], 2, 40, 1), "it saves no more than those that are there");
        assert!(pack(&caches[2], 2, 40, 2));
        assert_eq!(filled(), [true, false, true, false, false]);
        assert!(!pack(&caches[3], 3, 90, 3), "what saves less would not make room enough");
        assert_eq!(filled(), [true, false, true, false, false]);
        assert!(pack(&caches[4], 4, 90, 4));
        assert_eq!(filled(), [false, false, false, false, true]);
        assert_eq!(used(ledger), 90);
    }

    #[test]
    fn many_threads_leave_the_books_right() {
        let ledger = ledger(100);
        let caches: Vec<_> = (0..8).map(|_| cache(ledger)).collect();
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let caches = &caches;
                scope.spawn(move || {
                    for i in 0..2000_u32 {
                        let which = (i * 7 + thread * 3) % 8;
                        let weight = which + 8 * (i / 50 % 2);
                        let found = ask(&caches[which as usize], weight, 30, 1 + i as usize % 3);
                        assert!(found.is_none_or(|found| found == weight));
                    }
                });
            }
        });
        let held = caches.iter().filter(|cache| cache.is_filled()).count();
        assert_eq!(used(ledger), 30 * held);
        assert!(used(ledger) <= 100);
        drop(caches);
        assert_eq!(used(ledger), 0);
        assert!(lock(&ledger.0).holders.is_empty());
    }
}
