//! Which version of each file is in force. No I/O.
//!
//! A file comes into force whole or not at all, and no object is ever in force twice: of two files
//! that claim one object, the one that claimed it later is refused and keeps its last good version.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use steadfast_api::UnixTime;

use super::parse::{Invalid, Object};
use crate::names::ObjectName;

/// The files of the folder by their names.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<String, File>);

#[derive(Debug, Default)]
struct File {
    in_force: Vec<Object>,
    /// A version that parses and is not in force yet.
    candidate: Option<Vec<Object>>,
    problem: Option<Problem>,
}

/// Why the last version of a file is not in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    #[serde(flatten)]
    pub(super) invalid: Invalid,
    pub(super) since: UnixTime,
}

/// What became of a file in one round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Gone,
    InForce,
    Refused(Invalid),
}

/// What `/manifests.json` says of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Status {
    file: String,
    ok: bool,
    objects: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<Problem>,
}

/// What was read of a file; `None`: it is gone.
pub(super) type Read = Option<Result<Vec<Object>, Invalid>>;

impl Files {
    /// A file as it was in force when the store last ran: its last good version until it is read.
    pub(super) fn remember(&mut self, file: &str, in_force: Vec<Object>) {
        self.0.entry(file.to_owned()).or_default().in_force = in_force;
    }

    /// Takes over what was read of the files that changed, and says what became of each file whose
    /// fate changed.
    pub(super) fn update(
        &mut self,
        read: Vec<(String, Read)>,
        now: UnixTime,
    ) -> Vec<(String, Outcome)> {
        let mut outcomes = Vec::new();
        for (name, read) in read {
            match read {
                None => {
                    if self.0.remove(&name).is_some() {
                        outcomes.push((name, Outcome::Gone));
                    }
                }
                Some(Ok(objects)) => {
                    self.0.entry(name).or_default().candidate = Some(objects);
                }
                Some(Err(invalid)) => {
                    let file = self.0.entry(name.clone()).or_default();
                    file.candidate = None;
                    if file.refuse(invalid.clone(), now) {
                        outcomes.push((name, Outcome::Refused(invalid)));
                    }
                }
            }
        }
        self.settle(now, &mut outcomes);
        outcomes
    }

    /// Puts every candidate in force that claims nothing of another file.
    fn settle(&mut self, now: UnixTime, outcomes: &mut Vec<(String, Outcome)>) {
        let mut accepted: BTreeSet<String> =
            self.0.iter().filter(|(_, f)| f.candidate.is_some()).map(|(n, _)| n.clone()).collect();
        // Each round refuses one: at the end stand the versions that are in force already.
        while let Some((name, invalid)) = self.first_duplicate(&accepted) {
            accepted.remove(&name);
            if let Some(file) = self.0.get_mut(&name)
                && file.refuse(invalid.clone(), now)
            {
                outcomes.push((name, Outcome::Refused(invalid)));
            }
        }
        for name in accepted {
            if let Some(file) = self.0.get_mut(&name)
                && let Some(objects) = file.candidate.take()
            {
                file.in_force = objects;
                file.problem = None;
                outcomes.push((name, Outcome::InForce));
            }
        }
    }

    /// A file among `accepted` that claims an object twice or of another, and where: the last by
    /// name of those that claim it.
    fn first_duplicate(&self, accepted: &BTreeSet<String>) -> Option<(String, Invalid)> {
        let mut claims: BTreeMap<(&str, &ObjectName), Vec<(&str, u64)>> = BTreeMap::new();
        for (name, file) in &self.0 {
            for object in file.version(accepted.contains(name)) {
                let claim = (name.as_str(), object.line);
                claims.entry((&object.kind, &object.name)).or_default().push(claim);
            }
        }
        for ((kind, object), claims) in claims {
            let Some((index, (file, line))) =
                claims.iter().enumerate().rev().find(|(_, (file, _))| accepted.contains(*file))
            else {
                continue;
            };
            let other = claims.iter().enumerate().find(|(other, _)| *other != index);
            if let Some((_, (other, other_line))) = other {
                let reason = format!("{kind} {object} is also in {other}, line {other_line}");
                return Some(((*file).to_owned(), Invalid { line: *line, column: 1, reason }));
            }
        }
        None
    }

    /// Every object in force.
    pub(super) fn objects(&self) -> impl Iterator<Item = &Object> {
        self.0.values().flat_map(|file| &file.in_force)
    }

    /// The objects in force of each file.
    pub(super) fn in_force(&self) -> impl Iterator<Item = (&str, &[Object])> {
        self.0.iter().map(|(name, file)| (name.as_str(), file.in_force.as_slice()))
    }

    pub(super) fn status(&self) -> Vec<Status> {
        let status = |(name, file): (&String, &File)| Status {
            file: name.clone(),
            ok: file.problem.is_none(),
            objects: file.in_force.len(),
            problem: file.problem.clone(),
        };
        self.0.iter().map(status).collect()
    }
}

impl File {
    fn version(&self, candidate: bool) -> &[Object] {
        match &self.candidate {
            Some(objects) if candidate => objects,
            _ => &self.in_force,
        }
    }

    /// Whether this is news.
    fn refuse(&mut self, invalid: Invalid, now: UnixTime) -> bool {
        if self.problem.as_ref().is_some_and(|problem| problem.invalid == invalid) {
            return false;
        }
        let since = self.problem.as_ref().map_or(now, |problem| problem.since);
        self.problem = Some(Problem { invalid, since });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str, version: u64) -> Object {
        Object {
            kind: "Service".to_owned(),
            name: ObjectName::new("demo", name),
            value: version.into(),
            line: 1,
        }
    }

    fn invalid() -> Invalid {
        Invalid { line: 3, column: 4, reason: "bad".to_owned() }
    }

    fn update(files: &mut Files, read: &[(&str, Read)]) -> Vec<(String, Outcome)> {
        let read = read.iter().map(|(name, read)| ((*name).to_owned(), read.clone())).collect();
        files.update(read, UnixTime::from_secs(1))
    }

    fn problems(files: &Files) -> Vec<String> {
        files.status().into_iter().filter(|status| !status.ok).map(|status| status.file).collect()
    }

    fn in_force(files: &Files) -> Vec<(String, u64)> {
        let found = files.objects().map(|o| (o.name.name.clone(), o.value.as_u64().unwrap()));
        found.collect()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_version_whole() {
        let mut files = Files::default();
        let good = vec![object("a", 1), object("b", 1)];
        update(&mut files, &[("x", Some(Ok(good)))]);
        let outcomes = update(&mut files, &[("x", Some(Err(invalid())))]);
        assert_eq!(outcomes, [("x".to_owned(), Outcome::Refused(invalid()))]);
        assert_eq!(in_force(&files), [("a".to_owned(), 1), ("b".to_owned(), 1)]);
        assert_eq!(problems(&files), ["x"]);
        // The same again is no news.
        assert!(update(&mut files, &[("x", Some(Err(invalid())))]).is_empty());
        update(&mut files, &[("x", Some(Ok(vec![object("a", 2)])))]);
        assert_eq!(in_force(&files), [("a".to_owned(), 2)]);
        assert_eq!(problems(&files).len(), 0);
    }

    #[test]
    fn a_deleted_file_takes_its_objects_and_its_problem_with_it() {
        let mut files = Files::default();
        update(&mut files, &[("x", Some(Ok(vec![object("a", 1)])))]);
        update(&mut files, &[("x", Some(Err(invalid())))]);
        assert_eq!(update(&mut files, &[("x", None)]), [("x".to_owned(), Outcome::Gone)]);
        assert!(in_force(&files).is_empty() && problems(&files).is_empty());
    }

    #[test]
    fn an_object_in_two_files_stays_with_the_one_that_had_it() {
        let mut files = Files::default();
        update(&mut files, &[("z", Some(Ok(vec![object("a", 1)])))]);
        let outcomes = update(&mut files, &[("b", Some(Ok(vec![object("a", 2), object("c", 2)])))]);
        let Outcome::Refused(error) = &outcomes[0].1 else { panic!("{outcomes:?}") };
        assert!(error.reason.contains("Service demo/a is also in z, line 1"), "{error}");
        assert_eq!(in_force(&files), [("a".to_owned(), 1)]);
        // Once the other has let go, the refused version comes into force by itself.
        update(&mut files, &[("z", Some(Ok(Vec::new())))]);
        assert_eq!(in_force(&files), [("a".to_owned(), 2), ("c".to_owned(), 2)]);
    }

    #[test]
    fn of_two_new_files_the_first_by_name_has_the_object() {
        let mut files = Files::default();
        let read = |version| Some(Ok(vec![object("a", version)]));
        let outcomes = update(&mut files, &[("y", read(2)), ("x", read(1))]);
        assert_eq!(in_force(&files), [("a".to_owned(), 1)]);
        assert_eq!(problems(&files), ["y"]);
        assert_eq!(outcomes.len(), 2);
    }

    #[test]
    fn an_object_twice_in_one_file_is_refused() {
        let mut files = Files::default();
        update(&mut files, &[("x", Some(Ok(vec![object("a", 1), object("a", 2)])))]);
        assert!(in_force(&files).is_empty());
        assert_eq!(problems(&files), ["x"]);
    }

    #[test]
    fn files_can_exchange_their_objects_in_one_round() {
        let mut files = Files::default();
        let read = |name| Some(Ok(vec![object(name, 1)]));
        update(&mut files, &[("x", read("a")), ("y", read("b"))]);
        update(&mut files, &[("x", read("b")), ("y", read("a"))]);
        assert_eq!(problems(&files).len(), 0);
        assert_eq!(in_force(&files), [("b".to_owned(), 1), ("a".to_owned(), 1)]);
    }

    #[test]
    fn a_file_that_is_broken_when_the_store_starts_keeps_what_it_had() {
        let mut files = Files::default();
        files.remember("x", vec![object("a", 1)]);
        update(&mut files, &[("x", Some(Err(invalid())))]);
        assert_eq!(in_force(&files), [("a".to_owned(), 1)]);
    }
}
