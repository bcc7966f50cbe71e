//! The HTTP reader on good, bad and random bytes: what it finds does not depend on how the bytes were cut.

#[path = "../fuzz/harness.rs"]
#[allow(dead_code)] // the reader's part is used here
mod harness;

use harness::read;
use proptest::prelude::*;
use server::http::json_depth;

const CORPUS: &[(&str, usize, Option<u16>)] = &[
    ("GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 1, None),
    ("\r\n\r\nGET /a?b=c HTTP/1.0\n\nGET /d HTTP/1.0\r\n\r\n", 2, None),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n", 2, None),
    (
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: 1\r\n\r\n",
        1,
        None,
    ),
    ("POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nz", 1, None),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 65\r\n\r\n", 0, Some(413)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n41\r\n", 0, Some(413)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n", 0, Some(400)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", 0, Some(400)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 0, Some(400)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 0, Some(400)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 0, Some(400)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 0, Some(501)),
    // White space that is none in HTTP.
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \u{a0}chunked\r\n\r\n0\r\n\r\n", 0, Some(501)),
    ("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: \u{a0}1\r\n\r\na", 0, Some(400)),
    (
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\u{c}\r\na\r\n0\r\n\r\n",
        0,
        Some(400),
    ),
    ("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\t \r\na\r\n0\r\n\r\n", 1, None),
    ("GET / HTTP/1.1\r\n\r\n", 0, Some(400)),
    ("GET / HTTP/3\r\n\r\n", 0, Some(400)),
    ("nonsense\r\n\r\n", 0, Some(400)),
];

#[test]
fn corpus_gives_what_it_should_wherever_it_is_cut() {
    for (text, n, status) in CORPUS {
        let whole = read(&[text.as_bytes()]);
        assert_eq!((whole.0.len(), whole.1), (*n, *status), "{text:?}");
        let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
        assert_eq!(read(&bytes), whole, "{text:?} byte by byte");
        for at in 0..text.len() {
            let (a, b) = text.as_bytes().split_at(at);
            assert_eq!(read(&[a, b]), whole, "{text:?} cut at {at}");
        }
    }
}

#[test]
fn chunks_are_joined() {
    let (found, _) = read(&[CORPUS[3].0.as_bytes()]);
    assert_eq!(found[0].body, b"abc0123456789");
}

#[test]
fn a_head_without_end_is_refused() {
    let long = "GET / HTTP/1.1\r\nX: ".to_string() + &"a".repeat(300);
    assert_eq!(read(&[long.as_bytes()]).1, Some(431));
}

#[test]
fn depth_ignores_strings() {
    assert_eq!(json_depth(br#"{"a":["[[[\"[",[]]}"#), 3);
    assert_eq!(json_depth(b"]]]["), 1);
}

proptest! {
    /// Pieces of requests in any order, cut anywhere: no panic, and the same result as in one piece.
    #[test]
    fn cuts_do_not_matter(
        parts in proptest::collection::vec(prop_oneof![
            Just(b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec()), Just(b"\r\n".to_vec()), Just(b"\n".to_vec()),
            Just(b"Content-Length: 5\r\n".to_vec()), Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
            Just(b"5\r\nabcde\r\n".to_vec()), Just(b"0\r\n".to_vec()), proptest::collection::vec(any::<u8>(), 0..8),
        ], 0..12),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let bytes = parts.concat();
        let mut ends: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut at = 0;
        let pieces: Vec<&[u8]> = ends.iter().map(|&end| &bytes[core::mem::replace(&mut at, end)..end]).collect();
        prop_assert_eq!(read(&pieces), read(&[&bytes]));
    }
}
