//! One certificate of somebody else's CA, and what it must be like.

use rustls_pki_types::CertificateDer;
use steadfast_api::{KeyId, TrustDomain, UnixTime};
use webpki::EndEntityCert;
use x509_parser::asn1_rs::{Any, FromDer as _};
use x509_parser::prelude::{GeneralName, NameConstraints, ParsedExtension, X509Certificate};
use x509_parser::public_key::PublicKey;
use x509_parser::x509::X509Name;

use super::ImportError;

/// A certificate, and what it is called in an error.
pub(super) struct Certificate<'a> {
    pub(super) der: &'a [u8],
    pub(super) parsed: X509Certificate<'a>,
    pub(super) whose: String,
}

impl<'a> Certificate<'a> {
    pub(super) fn parse(der: &'a [u8], whose: &str) -> Result<Self, ImportError> {
        let malformed = |reason: String| ImportError::Malformed { whose: whose.to_owned(), reason };
        let (rest, parsed) =
            X509Certificate::from_der(der).map_err(|error| malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes follow it", rest.len())));
        }
        // What workloads verify with refuses forms that the other parser takes.
        let read = CertificateDer::from(der);
        EndEntityCert::try_from(&read)
            .map_err(|error| malformed(format!("workloads cannot read it: {error}")))?;
        Ok(Self { der, parsed, whose: whose.to_owned() })
    }

    pub(super) fn named(self, whose: &str) -> Self {
        Self { whose: whose.to_owned(), ..self }
    }

    pub(super) fn id(&self) -> KeyId {
        KeyId::of_spki(self.parsed.public_key().raw)
    }

    pub(super) fn not_before(&self) -> UnixTime {
        UnixTime::from_secs(self.parsed.validity().not_before.timestamp())
    }

    pub(super) fn not_after(&self) -> UnixTime {
        UnixTime::from_secs(self.parsed.validity().not_after.timestamp())
    }

    pub(super) fn signer(&self) -> String {
        shown(self.parsed.issuer())
    }

    pub(super) fn is_named_by(&self, signer: &Certificate<'_>) -> bool {
        self.parsed.issuer().as_raw() == signer.parsed.subject().as_raw()
    }

    pub(super) fn path_length(&self) -> Option<u32> {
        let constraints = self.parsed.basic_constraints().ok().flatten();
        constraints.and_then(|found| found.value.path_len_constraint)
    }

    /// Verifies its signature as every peer would.
    pub(super) fn check_signed_by(&self, signer: &Certificate<'_>) -> Result<(), ImportError> {
        let signature_id = signature_algorithm(self.der, self.parsed.tbs_certificate.as_ref());
        let key_id = key_algorithm(signer.parsed.public_key().raw);
        let known = webpki::ALL_VERIFICATION_ALGS.iter().find(|known| {
            Some(known.signature_alg_id().as_ref()) == signature_id
                && Some(known.public_key_alg_id().as_ref()) == key_id
        });
        let Some(known) = known else {
            return Err(ImportError::Algorithm {
                whose: self.whose.clone(),
                signature: self.parsed.signature_algorithm.algorithm.to_string(),
                key: signer.parsed.public_key().algorithm.algorithm.to_string(),
            });
        };
        signer.check_strength()?;
        let key = &signer.parsed.public_key().subject_public_key.data;
        let message = self.parsed.tbs_certificate.as_ref();
        known.verify_signature(key, message, &self.parsed.signature_value.data).map_err(|_| {
            ImportError::Signature { whose: self.whose.clone(), signer: self.signer() }
        })
    }

    fn check_strength(&self) -> Result<(), ImportError> {
        match self.parsed.public_key().parsed() {
            Ok(PublicKey::RSA(key)) if key.key_size() < RSA_BITS_MIN => {
                Err(ImportError::WeakKey { whose: self.whose.clone(), bits: key.key_size() })
            }
            _ => Ok(()),
        }
    }

    /// A CA that may sign, of our trust domain, valid now.
    pub(super) fn check_authority(
        &self,
        ours: &TrustDomain,
        now: UnixTime,
    ) -> Result<(), ImportError> {
        let whose = || self.whose.clone();
        let malformed = |what: &str| ImportError::Malformed { whose: whose(), reason: what.into() };
        let constraints = self.parsed.basic_constraints();
        let constraints =
            constraints.map_err(|_| malformed("its basicConstraints do not parse"))?;
        if !constraints.is_some_and(|found| found.value.ca) {
            return Err(ImportError::NotCa(whose()));
        }
        let usage =
            self.parsed.key_usage().map_err(|_| malformed("its keyUsage does not parse"))?;
        if usage.is_some_and(|found| !found.value.key_cert_sign()) {
            return Err(ImportError::KeyUsage(whose()));
        }
        self.check_strength()?;
        let names = self.parsed.subject_alternative_name();
        let names = names.map_err(|_| malformed("its subjectAltName does not parse"))?;
        let names = names.into_iter().flat_map(|found| &found.value.general_names);
        for name in names {
            match name {
                GeneralName::URI(uri)
                    if uri.starts_with("spiffe://") && *uri != ours.id().as_str() =>
                {
                    let found = uri.chars().take(NAME_CHARS_SHOWN).collect();
                    let (found, ours) = (found, ours.id().as_str().to_owned());
                    return Err(ImportError::TrustDomain { whose: whose(), found, ours });
                }
                _ => {}
            }
        }
        self.check_names(ours)?;
        if now < self.not_before() {
            return Err(ImportError::NotYetValid { whose: whose(), at: self.not_before() });
        }
        if now > self.not_after() {
            return Err(ImportError::Expired { whose: whose(), at: self.not_after() });
        }
        Ok(())
    }

    /// What peers ask of certificates between an SVID and its anchor, and of no anchor.
    pub(super) fn check_below_anchor(&self) -> Result<(), ImportError> {
        let usage = self.parsed.extended_key_usage().ok().flatten();
        match usage.is_some_and(|usage| !(usage.value.server_auth && usage.value.client_auth)) {
            true => Err(ImportError::ExtendedKeyUsage(self.whose.clone())),
            false => Ok(()),
        }
    }

    /// So many CAs may be below it.
    pub(super) fn check_path_length(&self, below: usize) -> Result<(), ImportError> {
        match self.path_length() {
            Some(found) if (found as usize) < below => Err(ImportError::PathLength {
                whose: self.whose.clone(),
                found: found.to_string(),
                needed: below,
                why: ", since so many CAs are below it",
            }),
            _ => Ok(()),
        }
    }

    /// The names of SVIDs must be allowed: a DNS name that ends in the trust domain, and a URI, for
    /// which workloads know no constraints, so that they refuse every chain with one.
    pub(super) fn check_names(&self, ours: &TrustDomain) -> Result<(), ImportError> {
        let refuse = |constraint: String| {
            Err(ImportError::NameConstraints { whose: self.whose.clone(), constraint })
        };
        let mut found = self.parsed.extensions().iter().filter_map(|extension| {
            match extension.parsed_extension() {
                ParsedExtension::NameConstraints(constraints) => Some(constraints),
                _ => None,
            }
        });
        let Some(NameConstraints { permitted_subtrees, excluded_subtrees }) = found.next() else {
            return Ok(());
        };
        let permitted = permitted_subtrees.iter().flatten();
        let excluded = excluded_subtrees.iter().flatten();
        let mut allowed = permitted.clone().filter_map(|subtree| dns(&subtree.base)).peekable();
        if allowed.peek().is_some() && !allowed.any(|base| within(ours.as_str(), base)) {
            return refuse("the permitted DNS names do not hold the trust domain".to_owned());
        }
        let mut forbidden = excluded.clone().filter_map(|subtree| dns(&subtree.base));
        if let Some(base) = forbidden.find(|base| within(ours.as_str(), base)) {
            // It is within our own name, so no longer than that.
            return refuse(format!("excluded DNS name {base:?}"));
        }
        let mut unknown = permitted.chain(excluded).filter(|subtree| {
            matches!(subtree.base, GeneralName::URI(_) | GeneralName::DirectoryName(_))
        });
        match unknown.next() {
            Some(subtree) => {
                refuse(subtree.base.to_string().chars().take(NAME_CHARS_SHOWN).collect())
            }
            None => Ok(()),
        }
    }
}

/// A name that somebody else chose: an error shows its beginning.
pub(super) fn shown(name: &X509Name<'_>) -> String {
    name.to_string().chars().take(NAME_CHARS_SHOWN).collect()
}

fn dns<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    match name {
        GeneralName::DNSName(base) => Some(base),
        _ => None,
    }
}

/// RFC 5280, 4.2.1.10: a name is within a constraint that it ends with, at a label.
fn within(name: &str, base: &str) -> bool {
    let base = base.strip_prefix('.').unwrap_or(base).to_ascii_lowercase();
    let above = name.strip_suffix(&base);
    above.is_some_and(|above| base.is_empty() || above.is_empty() || above.ends_with('.'))
}

/// The AlgorithmIdentifier of a certificate's signature, as its bytes without the header: what the
/// verifier's list is in.
fn signature_algorithm<'a>(der: &'a [u8], signed: &[u8]) -> Option<&'a [u8]> {
    let (_, certificate) = Any::from_der(der).ok()?;
    let rest = certificate.data.get(signed.len()..)?;
    Some(Any::from_der(rest).ok()?.1.data)
}

/// The same of a key.
fn key_algorithm(spki: &[u8]) -> Option<&[u8]> {
    let (_, spki) = Any::from_der(spki).ok()?;
    Some(Any::from_der(spki.data).ok()?.1.data)
}

/// A name that somebody else chose is shown up to here.
pub(super) const NAME_CHARS_SHOWN: usize = 120;
const RSA_BITS_MIN: usize = 2048;
