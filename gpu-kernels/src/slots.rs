//! Handles as plain numbers: what drivers give out for streams, events, modules and graphs.
//!
//! A number is a place and how often that place was used before, so a handle that was released is refused, not mistaken
//! for its successor. The first handle of a new table is 0.

use alloc::vec::Vec;

/// Bits of the place; the rest counts its uses.
const PLACE_BITS: u32 = 20;
const PLACE: u32 = (1 << PLACE_BITS) - 1;

/// A table of things by handle.
#[derive(Debug)]
pub struct Slots<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Slots<T> {
        Slots { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Keeps a thing. Panics at a million things at a time: a leak.
    pub fn insert(&mut self, thing: T) -> u32 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            self.places.len() as u32 - 1
        });
        assert!(place <= PLACE, "more than {PLACE} handles at a time");
        let (uses, slot) = &mut self.places[place as usize];
        *slot = Some(thing);
        *uses << PLACE_BITS | place
    }

    /// The thing of a handle.
    pub fn get(&self, id: u32) -> Option<&T> {
        let (uses, slot) = self.places.get((id & PLACE) as usize)?;
        slot.as_ref().filter(|_| uses << PLACE_BITS == id & !PLACE)
    }

    /// The thing of a handle, to change.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        let (uses, slot) = self.places.get_mut((id & PLACE) as usize)?;
        if *uses << PLACE_BITS == id & !PLACE { slot.as_mut() } else { None }
    }

    /// Takes the thing out; its handle is never valid again.
    pub fn remove(&mut self, id: u32) -> Option<T> {
        self.get(id)?;
        let place = id & PLACE;
        let (uses, slot) = &mut self.places[place as usize];
        // After 4096 uses a handle repeats; by then whoever held the old one is a bug found long ago.
        *uses = uses.wrapping_add(1) & (u32::MAX >> PLACE_BITS);
        self.free.push(place);
        slot.take()
    }

    /// All things.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().filter_map(|(_, slot)| slot.as_ref())
    }

    /// All things, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut().filter_map(|(_, slot)| slot.as_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_handle_is_not_its_successor() {
        let mut slots = Slots::default();
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert_eq!((a, slots.get(a), slots.get(b)), (0, Some(&'a'), Some(&'b')));
        assert_eq!(slots.remove(a), Some('a'));
        assert_eq!(slots.get(a), None);
        assert_eq!(slots.remove(a), None);
        let c = slots.insert('c');
        assert_ne!(a, c);
        assert_eq!(slots.get_mut(a), None);
        assert_eq!(slots.get_mut(c), Some(&mut 'c'));
        assert_eq!(slots.iter().collect::<Vec<_>>(), [&'c', &'b']);
        assert_eq!(slots.get(77), None);
    }
}
