//! The chunked coding (RFC 9112 §7.1) as a pure state machine: bytes in, frames out.
//!
//! Sizes are hexadecimal digits and nothing else; extensions are skipped, within a limit; every
//! line ends in CRLF. Data is handed out as it comes, never gathered.

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;

use super::decode::Decoded;
use super::parse::{HEADERS_MAX, HeadError, HeadScan, LineEnds, headers};
use crate::http::body::Frame;
use crate::http::head::strip_from_trailers;

/// Decodes one chunked body.
#[derive(Debug)]
pub struct ChunkDecoder {
    state: State,
    overhead_bytes: usize,
}

#[derive(Debug)]
enum State {
    Data { remaining: u64 },
    Done,
    Failed(ChunkError),
    Line(Line),
    Trailers(HeadScan),
}

/// Where in what stands between data and data.
#[derive(Clone, Copy, Debug)]
enum Line {
    AfterData,
    AfterDataLf,
    Extension { size: u64 },
    Size { size: u64, digits: u8 },
    SizeLf { size: u64 },
}

/// Why a chunked body is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// What follows a chunk is not CRLF: chunk and size differ.
    #[error("a chunk is not followed by CRLF; it is longer than its size says")]
    DataEnd,
    /// A control character in an extension.
    #[error("a chunk extension contains a control character")]
    Extension,
    /// A line that does not end in CRLF.
    #[error("the line of a chunk size does not end in CRLF")]
    LineEnd,
    /// Too much that is not content.
    #[error("chunk extensions, or trailers, are longer than {OVERHEAD_BYTES_MAX} bytes")]
    Overhead,
    /// No hexadecimal number below 2^64.
    #[error("a chunk size is no hexadecimal number below 2^64")]
    Size,
    /// Malformed trailers.
    #[error("the trailers are malformed: {0}")]
    Trailers(HeadError),
}

impl ChunkDecoder {
    /// At the start of a body.
    pub fn new() -> Self {
        Self { state: State::Line(Line::Size { size: 0, digits: 0 }), overhead_bytes: 0 }
    }

    /// Takes the next frame off the front of `input`, and whatever stands between frames.
    ///
    /// # Errors
    /// The bytes are no chunked coding. Every further call says so again: who reads on, to discard
    /// what is left, must not find the end of the body in garbage and a next request behind it.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Decoded, ChunkError> {
        let decoded = self.next(input);
        if let Err(error) = decoded {
            self.state = State::Failed(error);
        }
        decoded
    }

    fn next(&mut self, input: &mut BytesMut) -> Result<Decoded, ChunkError> {
        loop {
            match &mut self.state {
                State::Failed(error) => return Err(*error),
                State::Done => return Ok(Decoded::End),
                State::Data { remaining } => {
                    if input.is_empty() {
                        return Ok(Decoded::NeedMore);
                    }
                    let data = split_up_to(input, *remaining);
                    *remaining -= data.len() as u64;
                    if *remaining == 0 {
                        self.state = State::Line(Line::AfterData);
                    }
                    return Ok(Decoded::Frame(Frame::Data(data)));
                }
                State::Trailers(scan) => {
                    let end = scan.find_end(input).map_err(ChunkError::Trailers)?;
                    let Some(end) = end else {
                        return if input.len() > OVERHEAD_BYTES_MAX {
                            Err(ChunkError::Overhead)
                        } else {
                            Ok(Decoded::NeedMore)
                        };
                    };
                    if end > OVERHEAD_BYTES_MAX {
                        return Err(ChunkError::Overhead);
                    }
                    let trailers = trailers(&input.split_to(end).freeze())?;
                    self.state = State::Done;
                    if !trailers.is_empty() {
                        return Ok(Decoded::Frame(Frame::Trailers(trailers)));
                    }
                }
                &mut State::Line(line) => {
                    let Some(&byte) = input.first() else { return Ok(Decoded::NeedMore) };
                    input.advance(1);
                    self.state = self.line_byte(line, byte)?;
                }
            }
        }
    }

    /// Whether the body is over.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn line_byte(&mut self, line: Line, byte: u8) -> Result<State, ChunkError> {
        Ok(State::Line(match (line, byte) {
            (Line::AfterData, b'\r') => Line::AfterDataLf,
            (Line::AfterDataLf, b'\n') => Line::Size { size: 0, digits: 0 },
            (Line::AfterData | Line::AfterDataLf, _) => return Err(ChunkError::DataEnd),
            (Line::Size { size, digits }, _) => match (char::from(byte).to_digit(16), byte) {
                (Some(digit), _) if digits < SIZE_DIGITS_MAX => {
                    Line::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
                }
                (None, b'\r') if digits > 0 => Line::SizeLf { size },
                // White space is allowed in front of an extension's semicolon.
                (None, b';' | b' ' | b'\t') if digits > 0 => Line::Extension { size },
                _ => return Err(ChunkError::Size),
            },
            (Line::Extension { size }, _) => {
                self.overhead_bytes += 1;
                match byte {
                    _ if self.overhead_bytes > OVERHEAD_BYTES_MAX => {
                        return Err(ChunkError::Overhead);
                    }
                    b'\r' => Line::SizeLf { size },
                    b'\t' | b' '..=b'~' | 0x80.. => Line::Extension { size },
                    _ => return Err(ChunkError::Extension),
                }
            }
            (Line::SizeLf { size: 0 }, b'\n') => {
                return Ok(State::Trailers(HeadScan::new(LineEnds::Strict)));
            }
            (Line::SizeLf { size }, b'\n') => return Ok(State::Data { remaining: size }),
            (Line::SizeLf { .. }, _) => return Err(ChunkError::LineEnd),
        }))
    }
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        Self::new()
    }
}

/// At most this much off the front.
pub(super) fn split_up_to(input: &mut BytesMut, bytes_max: u64) -> Bytes {
    let bytes = usize::try_from(bytes_max).unwrap_or(usize::MAX).min(input.len());
    input.split_to(bytes).freeze()
}

fn trailers(block: &Bytes) -> Result<HeaderMap, ChunkError> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let malformed = |what| ChunkError::Trailers(HeadError::Syntax(what));
    let parsed = httparse::parse_headers(block, &mut lines).map_err(|error| match error {
        httparse::Error::TooManyHeaders => ChunkError::Trailers(HeadError::TooManyHeaders),
        httparse::Error::HeaderName => malformed("field name"),
        _ => malformed("field value"),
    })?;
    let httparse::Status::Complete((_, lines)) = parsed else {
        return Err(malformed("they end early"));
    };
    let mut trailers = headers(block, lines).map_err(ChunkError::Trailers)?;
    strip_from_trailers(&mut trailers);
    Ok(trailers)
}

/// Of all extensions of a body together, and of its trailers: what is neither is content.
const OVERHEAD_BYTES_MAX: usize = 16 * 1024;
/// Sixteen digits are 64 bits.
const SIZE_DIGITS_MAX: u8 = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that a decoder makes of bytes which arrive in these pieces.
    fn decode<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(Vec<u8>, Option<HeaderMap>, bool, usize), ChunkError> {
        let (mut decoder, mut input) = (ChunkDecoder::new(), BytesMut::new());
        let (mut data, mut trailers) = (Vec::new(), None);
        for piece in pieces {
            input.extend_from_slice(piece);
            loop {
                match decoder.decode(&mut input)? {
                    Decoded::End | Decoded::NeedMore => break,
                    Decoded::Frame(Frame::Data(bytes)) => data.extend_from_slice(&bytes),
                    Decoded::Frame(Frame::Trailers(map)) => trailers = Some(map),
                }
            }
        }
        Ok((data, trailers, decoder.is_done(), input.len()))
    }

    #[test]
    fn chunks_are_decoded_and_what_follows_is_left() {
        let body = b"5\r\nhello\r\n1;a=\"b\"\r\n!\r\n00\r\nx-sum: 6\r\nhost: evil\r\n\r\nGET /";
        let (data, trailers, done, left) = decode([body.as_slice()]).unwrap();
        assert_eq!(data, b"hello!");
        let trailers = trailers.unwrap();
        assert_eq!((trailers.len(), trailers["x-sum"].as_bytes()), (1, b"6".as_slice()));
        assert!(done);
        assert_eq!(left, b"GET /".len());
    }

    #[test]
    fn what_is_no_chunked_coding_is_refused() {
        let long_extension = [b"1;".as_slice(), &vec![b'x'; OVERHEAD_BYTES_MAX + 1]].concat();
        let long_trailers = [b"0\r\na: ".as_slice(), &vec![b'x'; OVERHEAD_BYTES_MAX]].concat();
        let cases: &[(&[u8], ChunkError)] = &[
            (b"\r\n", ChunkError::Size),
            (b"-1\r\n", ChunkError::Size),
            (b"+1\r\n", ChunkError::Size),
            (b"0x1\r\n", ChunkError::Size),
            (b" 1\r\n", ChunkError::Size),
            (b"1g\r\n", ChunkError::Size),
            (b"00000000000000001\r\n", ChunkError::Size),
            (b"fffffffffffffffff\r\n", ChunkError::Size),
            (b"1\n", ChunkError::Size),
            (b"1\rx", ChunkError::LineEnd),
            (b"1;a\nb\r\n", ChunkError::Extension),
            (b"1;a\0\r\n", ChunkError::Extension),
            (b"1\r\nab", ChunkError::DataEnd),
            (b"1\r\na\n", ChunkError::DataEnd),
            (b"1\r\na\rb", ChunkError::DataEnd),
            (b"0\r\n\n", ChunkError::Trailers(HeadError::BareLineEnd)),
            (b"0\r\na : b\r\n\r\n", ChunkError::Trailers(HeadError::Syntax("field name"))),
            (b"0\r\na: b\r\n c\r\n\r\n", ChunkError::Trailers(HeadError::Syntax("field name"))),
            (&long_extension, ChunkError::Overhead),
            (&long_trailers, ChunkError::Overhead),
        ];
        for (body, expected) in cases {
            let shown = String::from_utf8_lossy(&body[..body.len().min(40)]);
            assert_eq!(decode([*body]).unwrap_err(), *expected, "{shown:?}");
        }
    }

    #[test]
    fn who_reads_on_after_an_error_finds_no_end() {
        for body in ["1g\r\na\r\n0\r\n\r\nGET /", "0\r\na : b\r\n\r\n0\r\n\r\nGET /"] {
            let (mut decoder, mut input) = (ChunkDecoder::new(), BytesMut::from(body));
            let first = decoder.decode(&mut input).unwrap_err();
            for _ in 0..body.len() {
                assert_eq!(decoder.decode(&mut input).unwrap_err(), first, "{body:?}");
            }
            assert!(!decoder.is_done());
        }
    }

    #[test]
    fn the_largest_size_is_still_a_size() {
        let (data, _, done, _) = decode([b"ffffffffffffffff\r\nabc".as_slice()]).unwrap();
        assert_eq!((data.as_slice(), done), (b"abc".as_slice(), false));
    }

    proptest! {
        #[test]
        fn any_split_decodes_alike(
            bodies in proptest::collection::vec("[a-z]{1,20}", 0..6),
            noise in "[0-9a-f;\r\n:x -]{0,12}",
            cuts in proptest::collection::vec(0usize..200, 0..8),
        ) {
            let mut wire = Vec::new();
            for body in &bodies {
                wire.extend_from_slice(format!("{:x};e=1\r\n{body}\r\n", body.len()).as_bytes());
            }
            wire.extend_from_slice(b"0\r\nx-t: 1\r\n\r\n");
            wire.extend_from_slice(noise.as_bytes());
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(wire.len())).collect();
            cuts.sort_unstable();
            cuts.push(wire.len());
            let mut from = 0;
            let pieces: Vec<_> = cuts
                .iter()
                .map(|&to| &wire[std::mem::replace(&mut from, to)..to])
                .collect();
            prop_assert_eq!(decode(pieces), decode([wire.as_slice()]));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let whole = decode([bytes.as_slice()]);
            let single: Vec<_> = bytes.chunks(1).collect();
            prop_assert_eq!(decode(single), whole);
        }
    }
}
