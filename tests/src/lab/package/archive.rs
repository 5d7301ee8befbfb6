//! tar (POSIX ustar) and ar archives, reduced to what packages need. Owner is root and time is 0,
//! so that the same files give the same bytes.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail, ensure};

/// A file in an archive.
#[derive(Debug, Clone)]
pub(in crate::lab) struct Entry {
    pub(in crate::lab) path: String,
    pub(in crate::lab) mode: u32,
    pub(in crate::lab) bytes: Vec<u8>,
}

impl Entry {
    pub(in crate::lab) fn file(path: &str, mode: u32, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), mode, bytes }
    }
}

const BLOCK: usize = 512;

/// Creates an archive of these files and of the directories above them.
pub(in crate::lab) fn tar(files: &[Entry]) -> anyhow::Result<Vec<u8>> {
    let mut archive = Vec::new();
    let mut made = BTreeSet::new();
    for file in files {
        for (at, _) in file.path.match_indices('/') {
            let directory = &file.path[..=at];
            if made.insert(directory.to_owned()) {
                archive.extend(header(directory, 0o755, 0, b'5')?);
            }
        }
        archive.extend(header(&file.path, file.mode, file.bytes.len(), b'0')?);
        archive.extend(&file.bytes);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.resize(archive.len() + 2 * BLOCK, 0);
    Ok(archive)
}

fn header(path: &str, mode: u32, size: usize, kind: u8) -> anyhow::Result<[u8; BLOCK]> {
    ensure!(path.len() < 100, "the path {path} is too long");
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, path);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The checksum is computed with its own field blank.
    put(148, "        ");
    put(257, "ustar\x0000root");
    put(297, "root");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

/// Returns the files of an archive that [`tar`] created.
pub(super) fn read_tar(archive: &[u8]) -> anyhow::Result<Vec<Entry>> {
    let mut files = Vec::new();
    let mut rest = archive;
    loop {
        let (header, after) = rest.split_at_checked(BLOCK).context("the archive is truncated")?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(files);
        }
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            - header[148..156].iter().map(|byte| u32::from(*byte)).sum::<u32>()
            + 8 * u32::from(b' ');
        ensure!(octal(&header[148..154])? == u64::from(sum), "a header has a wrong checksum");
        let size = usize::try_from(octal(&header[124..135])?)?;
        let bytes = after.get(..size).context("the archive is truncated")?;
        if header[156] == b'0' {
            let path = text(&header[..100])?;
            let mode = u32::try_from(octal(&header[100..107])?)?;
            files.push(Entry::file(path, mode, bytes.to_vec()));
        }
        rest = after.get(size.next_multiple_of(BLOCK)..).context("the archive is truncated")?;
    }
}

fn text(field: &[u8]) -> anyhow::Result<&str> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    Ok(std::str::from_utf8(&field[..end])?)
}

fn octal(field: &[u8]) -> anyhow::Result<u64> {
    Ok(u64::from_str_radix(text(field)?, 8)?)
}

const AR_MAGIC: &[u8] = b"!<arch>\n";

/// Creates an ar archive of these members, in this order.
pub(super) fn ar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = AR_MAGIC.to_vec();
    for (name, bytes) in members {
        let header =
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, bytes.len());
        archive.extend(header.as_bytes());
        archive.extend(bytes);
        if bytes.len() % 2 == 1 {
            archive.push(b'\n');
        }
    }
    archive
}

/// Returns the members of an ar archive.
pub(super) fn read_ar(archive: &[u8]) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let Some(mut rest) = archive.strip_prefix(AR_MAGIC) else { bail!("not an ar archive") };
    let mut members = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(60) {
        let name = std::str::from_utf8(&header[..16])?.trim_end().to_owned();
        let size: usize = std::str::from_utf8(&header[48..58])?.trim_end().parse()?;
        members.push((name, after.get(..size).context("the archive is truncated")?.to_vec()));
        rest = after.get(size.next_multiple_of(2)..).unwrap_or_default();
    }
    Ok(members)
}
