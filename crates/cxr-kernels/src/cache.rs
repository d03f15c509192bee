//! A place for what a kernel derives from a weight (a packed or rotated copy).

use std::any::Any;
use std::sync::{Arc, Mutex};

/// A value derived from a weight, together with what says that the weight is still the same.
type Entry = (Arc<dyn Any + Send + Sync>, Arc<dyn Any + Send + Sync>);

/// Holds what a kernel derives from one weight, beside that weight.
///
/// It is no tensor and no parameter: a module's record, its optimizer and its files never see it. A kernel asks
/// for its packed form with [`get_or_pack`](Self::get_or_pack); the answer is made anew when the weight is no
/// longer the one that it was made from, so that an optimizer step or a merged adapter can never meet stale
/// packing. Clones share the entry: cloned modules share their weights too.
#[derive(Clone, Default)]
pub struct WeightCache {
    entry: Arc<Mutex<Option<Entry>>>,
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

    /// The value packed from the weight that `key` identifies, packing it now if it is not there.
    ///
    /// `key` is kept, so it should hold on to the weight's storage (an address alone could be used again by
    /// another weight); `same` compares the kept key with the weight at hand.
    pub fn get_or_pack<K, V>(
        &self,
        key: K,
        same: impl FnOnce(&K, &K) -> bool,
        pack: impl FnOnce() -> V,
    ) -> Arc<V>
    where
        K: Any + Send + Sync,
        V: Any + Send + Sync,
    {
        // A panic while packing leaves no entry behind, so a poisoned lock still guards a sound state.
        let mut entry = self.entry.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((kept, value)) = entry.as_ref()
            && let (Some(kept), Ok(value)) = (kept.downcast_ref::<K>(), value.clone().downcast::<V>())
            && same(kept, &key)
        {
            return value;
        }
        *entry = None;
        let value = Arc::new(pack());
        *entry = Some((Arc::new(key), value.clone()));
        value
    }

    /// Forgets the packed value and frees its memory.
    pub fn clear(&self) {
        *self.entry.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    }

    /// Whether a packed value is held.
    pub fn is_filled(&self) -> bool {
        self.entry.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_key_packs_again_and_an_equal_one_does_not() {
        let cache = WeightCache::new();
        let mut packed = 0;
        for (key, expected) in [(1_u32, 1), (1, 1), (2, 2), (2, 2), (1, 3)] {
            cache.get_or_pack(key, |a, b| a == b, || packed += 1);
            assert_eq!(packed, expected);
        }
        assert!(cache.clone().is_filled());
        cache.clear();
        assert!(!cache.is_filled());
    }

    #[test]
    fn another_type_of_value_is_not_confused() {
        let cache = WeightCache::new();
        cache.get_or_pack(1_u32, |a, b| a == b, || 1_u8);
        assert_eq!(*cache.get_or_pack(1_u32, |a, b| a == b, || "text"), "text");
    }
}
