//! What waits to be sent to a client.

use alloc::vec::Vec;

/// Bytes of memory that an empty buffer keeps, enough for the pieces of a stream.
const KEPT_BYTES: usize = 4 << 10;

/// Bytes to send, those that are sent already in front of them: these go when they are most of the buffer, so that a long
/// answer that leaves in small pieces is not moved at each.
#[derive(Default)]
pub(crate) struct Output {
    bytes: Vec<u8>,
    n_sent: usize,
}

impl Output {
    /// What is still to be sent.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.n_sent..]
    }

    /// Bytes still to be sent.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.n_sent
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where more is appended; what is in it stays as it is.
    pub fn end(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// So many bytes of the rest are sent, all if there are fewer.
    pub fn sent(&mut self, n: usize) {
        self.n_sent += n.min(self.len());
        if self.is_empty() {
            self.bytes.clear();
            self.bytes.shrink_to(KEPT_BYTES);
            self.n_sent = 0;
        } else if self.n_sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.n_sent);
            self.n_sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is moved is no more than what is sent, however small the pieces.
    #[test]
    fn small_pieces_move_each_byte_once() {
        const LEN: usize = 1 << 20;
        let mut output = Output::default();
        output.end().extend((0..LEN).map(|i| i as u8));
        let (mut said, mut moved) = (Vec::new(), 0);
        while !output.is_empty() {
            let piece = &output.rest()[..output.len().min(1000)];
            said.extend_from_slice(piece);
            let (n, expected) = (piece.len(), piece.as_ptr_range().end);
            output.sent(n);
            if output.rest().as_ptr() != expected {
                moved += output.len();
            }
        }
        assert!(said.iter().enumerate().all(|(i, byte)| *byte == i as u8) && said.len() == LEN);
        assert!(moved <= LEN, "{moved} bytes are moved for {LEN}");
        assert!(output.end().capacity() <= KEPT_BYTES, "{} bytes are kept", output.end().capacity());
    }

    #[test]
    fn more_may_come_behind_what_is_sent_in_part() {
        let mut output = Output::default();
        output.end().extend_from_slice(b"abcdef");
        output.sent(2);
        output.end().extend_from_slice(b"gh");
        assert_eq!((output.rest(), output.len()), (&b"cdefgh"[..], 6));
        output.sent(5);
        assert_eq!(output.rest(), b"h");
        output.sent(9);
        assert!(output.is_empty());
    }
}
