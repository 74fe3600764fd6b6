//! The keys of anchors in a PKCS#11 token: they are made there, sign there and are destroyed there.
//!
//! The module, C code of whoever made the token, is loaded only when an operator has chosen it. A
//! session is opened once and again after every failure, so that a token which was away heals by
//! itself. One thing is never tried twice: a PIN that the token has refused, since tokens lock
//! themselves after a few; it is tried again once its file has changed.
//!
//! A key is found by its CKA_ID, which is our own id of it, SHA-256 of its SPKI.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use sha2::{Digest as _, Sha256};
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyKind, KeyStore, KeyStoreError, PrivateKey, Zeroizing};

/// Which token, and how it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenConfig {
    /// The PKCS#11 module: a shared library.
    pub module: PathBuf,
    /// The label of the token.
    pub label: String,
    /// The file that has the user's PIN.
    pub pin_file: PathBuf,
}

/// A token, as a place for keys.
#[derive(Clone)]
pub struct Token(Arc<Inner>);

struct Inner {
    config: TokenConfig,
    connection: Mutex<Connection>,
}

#[derive(Default)]
struct Connection {
    /// The loaded module. It stays loaded: unloading C code is asking for trouble.
    module: Option<Pkcs11>,
    session: Option<Session>,
    /// The version of the PIN's file that the token has refused.
    refused: Option<FileVersion>,
}

/// Tells one content of a file from the next, without keeping the content.
type FileVersion = (i64, i64, u64);

/// Why the token did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A key that could leave the token is no key of a token.
    #[error(
        "the token {label:?} made a key that could be copied out of it, which was destroyed again: \
         allow it keys that are sensitive and not extractable, or use another token"
    )]
    Extractable {
        /// Of the token.
        label: String,
    },
    /// No such key.
    #[error(
        "the token {label:?} has no key {key}: if it was destroyed or is in another token, rotate \
         to the standby"
    )]
    Missing {
        /// Of the token.
        label: String,
        /// Which key.
        key: KeyId,
    },
    /// The module cannot be loaded.
    #[error(
        "--pkcs11-module {}: it cannot be loaded as a PKCS#11 module; is it the right file for this \
         machine (SoftHSM's is libsofthsm2.so)?",
        module.display()
    )]
    Module {
        /// Its file.
        module: PathBuf,
        /// Why not.
        #[source]
        source: Error,
    },
    /// No token of this label, or several.
    #[error(
        "--pkcs11-token {label:?}: the module {} has {found} tokens of this label; it has {there}. \
         Plug it in, or initialize it (softhsm2-util --init-token, or the maker's tool)",
        module.display()
    )]
    NoToken {
        /// What was asked for.
        label: String,
        /// The module.
        module: PathBuf,
        /// How many there are.
        found: usize,
        /// What there is, with the slots.
        there: String,
    },
    /// The PIN's file.
    #[error("--pkcs11-pin-file {}: {reason}", file.display())]
    PinFile {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The PIN was refused, or would be the last try.
    #[error(
        "the token {label:?} in slot {slot} does not take the PIN in {}: {reason}; it is not tried \
         again before the file changes, so that the token does not lock itself",
        file.display()
    )]
    Pin {
        /// Of the token.
        label: String,
        /// Where it is.
        slot: u64,
        /// The PIN's file.
        file: PathBuf,
        /// What the token says.
        reason: String,
    },
    /// Something else.
    #[error("the token {label:?} of {} cannot {action}: {source}; is it still there?", module.display())]
    Token {
        /// Of the token.
        label: String,
        /// The module.
        module: PathBuf,
        /// What was tried, as a verb.
        action: &'static str,
        /// What the module says.
        source: Error,
    },
    /// A key that should be gone is still there.
    #[error("the token {label:?} still has the key {key} after it was told to destroy it")]
    Undestroyed {
        /// Of the token.
        label: String,
        /// Which key.
        key: KeyId,
    },
    /// The public key of a key does not parse.
    #[error("the token {label:?} shows a public key that is no point on P-256 for the key {key}")]
    Public {
        /// Of the token.
        label: String,
        /// Which key.
        key: String,
    },
}

impl Token {
    /// This token, which is opened when it is first needed.
    pub fn new(config: TokenConfig) -> Self {
        Self(Arc::new(Inner { config, connection: Mutex::default() }))
    }

    /// Opens the token, if it is not, and asks it for what only the token itself knows.
    ///
    /// # Errors
    /// Why it cannot be used now.
    pub async fn check(&self) -> Result<(), TokenError> {
        self.run(Inner::list).await.map(drop)
    }

    /// Off the runtime's threads: a device takes its time.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, TokenError> + Send + 'static,
    ) -> Result<T, TokenError> {
        let inner = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(done) => done,
            // A panic, or a runtime that ends: the caller ends with it.
            Err(_) => Err(self.0.failed("finish its work", Error::NotSupported)),
        }
    }
}

#[async_trait::async_trait]
impl KeyStore for Token {
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let (id, public) = self.run(Inner::make).await.map_err(device)?;
        Ok(Arc::new(TokenKey { token: Arc::clone(&self.0), id, public }))
    }

    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let public = self.run(move |token| token.public(id)).await.map_err(device)?;
        Ok(Arc::new(TokenKey { token: Arc::clone(&self.0), id, public }))
    }

    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError> {
        self.run(move |token| token.exists(id)).await.map_err(device)
    }

    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError> {
        self.run(Inner::list).await.map_err(device)
    }

    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError> {
        self.run(move |token| token.destroy(id)).await.map_err(device)
    }

    /// RFC 7512.
    fn place_of(&self, id: KeyId) -> String {
        let escaped = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.' | '_' => c.to_string(),
            other => {
                let mut bytes = [0; 4];
                other.encode_utf8(&mut bytes).bytes().map(|byte| format!("%{byte:02X}")).collect()
            }
        };
        let label: String = self.0.config.label.chars().map(escaped).collect();
        format!("pkcs11:token={label};object={LABEL_PREFIX}{id}")
    }
}

/// A key in a token.
struct TokenKey {
    token: Arc<Inner>,
    id: KeyId,
    public: Vec<u8>,
}

impl PrivateKey for TokenKey {
    fn id(&self) -> KeyId {
        self.id
    }

    fn kind(&self) -> KeyKind {
        KeyKind::EcdsaP256
    }

    fn public(&self) -> &[u8] {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
        // CKM_ECDSA, which every token has, signs a digest and gives both numbers as they are.
        let digest = Sha256::digest(message);
        let signed = self.token.with_session("sign", |session| {
            let keys = session.find_objects(&by_id(ObjectClass::PRIVATE_KEY, self.id))?;
            match keys.first() {
                Some(key) => session.sign(&Mechanism::Ecdsa, *key, &digest).map(Ok),
                None => Ok(Err(self.token.missing(self.id))),
            }
        });
        let signature = signed.and_then(|signed| signed).map_err(device)?;
        asn1_signature(&signature).ok_or(KeyStoreError::Signing(self.id))
    }
}

impl Inner {
    fn make(&self) -> Result<(KeyId, Vec<u8>), TokenError> {
        let made = self.with_session("make a key", |session| {
            let label = || Attribute::Label(NEW_LABEL.into());
            let public = [
                Attribute::Token(true),
                Attribute::Private(false),
                Attribute::Verify(true),
                Attribute::EcParams(P256_OID.to_vec()),
                label(),
            ];
            let private = [
                Attribute::Token(true),
                Attribute::Private(true),
                Attribute::Sensitive(true),
                Attribute::Extractable(false),
                Attribute::Sign(true),
                label(),
            ];
            session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private).map(Ok)
        });
        let (public, private) = made.and_then(|made| made)?;
        match self.name(public, private) {
            Ok(made) => Ok(made),
            Err(error) => {
                // Nothing names it: it must not lie about. Why it has no name is what counts.
                let _ = self.with_session("destroy a key", |session| {
                    session.destroy_object(private)?;
                    session.destroy_object(public)
                });
                Err(error)
            }
        }
    }

    /// Gives a new key pair its id, once it is known that it cannot leave the token.
    fn name(
        &self,
        public: ObjectHandle,
        private: ObjectHandle,
    ) -> Result<(KeyId, Vec<u8>), TokenError> {
        let kept = self.with_session("show a new key", |session| {
            session.get_attributes(private, &[AttributeType::Extractable, AttributeType::Sensitive])
        })?;
        if !(kept.contains(&Attribute::Extractable(false))
            && kept.contains(&Attribute::Sensitive(true)))
        {
            return Err(TokenError::Extractable { label: self.config.label.clone() });
        }
        let point = self.with_session("show a new key", |session| {
            session.get_attributes(public, &[AttributeType::EcPoint])
        })?;
        let point = self.point(&point, "that is new")?;
        let id = KeyId::of_spki(&[P256_SPKI, &point].concat());
        let names = [
            Attribute::Id(id.as_bytes().to_vec()),
            Attribute::Label(format!("{LABEL_PREFIX}{id}").into()),
        ];
        self.with_session("name a new key", |session| {
            session.update_attributes(public, &names)?;
            session.update_attributes(private, &names)
        })?;
        Ok((id, point))
    }

    fn public(&self, id: KeyId) -> Result<Vec<u8>, TokenError> {
        let found = self.with_session("look for a key", |session| {
            let private = session.find_objects(&by_id(ObjectClass::PRIVATE_KEY, id))?;
            let public = session.find_objects(&by_id(ObjectClass::PUBLIC_KEY, id))?;
            match (private.first(), public.first()) {
                (Some(_), Some(public)) => {
                    session.get_attributes(*public, &[AttributeType::EcPoint]).map(Some)
                }
                _ => Ok(None),
            }
        })?;
        let point = self.point(&found.ok_or_else(|| self.missing(id))?, &id.to_string())?;
        // Whoever may write in the token might have put another key in its place.
        match KeyId::of_spki(&[P256_SPKI, &point].concat()) == id {
            true => Ok(point),
            false => Err(self.no_point(&id.to_string())),
        }
    }

    /// Whether it is there. A module may show an empty token for one that is away, and a key that
    /// cannot be seen must not pass for destroyed: nothing is believed to be gone before the module
    /// has started anew and has found the token.
    fn exists(&self, id: KeyId) -> Result<bool, TokenError> {
        let found = || {
            self.with_session("look for a key", |session| {
                session.find_objects(&by_id(ObjectClass::PRIVATE_KEY, id))
            })
        };
        if !found()?.is_empty() {
            return Ok(true);
        }
        self.restart(&mut self.connection())?;
        Ok(!found()?.is_empty())
    }

    fn list(&self) -> Result<Vec<KeyId>, TokenError> {
        let found = self.with_session("list its keys", |session| {
            let keys = session.find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY)])?;
            let named = [AttributeType::Id, AttributeType::Label];
            let attributes = |key: ObjectHandle| session.get_attributes(key, &named);
            keys.into_iter().map(attributes).collect::<Result<Vec<_>, _>>()
        })?;
        // Others may have keys in the same token.
        let ours = |attributes: Vec<Attribute>| {
            let id = attributes.iter().find_map(|attribute| match attribute {
                Attribute::Id(bytes) => KeyId::from_slice(bytes),
                _ => None,
            })?;
            let label = Attribute::Label(format!("{LABEL_PREFIX}{id}").into());
            attributes.contains(&label).then_some(id)
        };
        let mut ids: Vec<_> = found.into_iter().filter_map(ours).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn destroy(&self, id: KeyId) -> Result<(), TokenError> {
        self.with_session("destroy a key", |session| {
            // The private one first: without it the other is of no use to anybody.
            for class in [ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
                for object in session.find_objects(&by_id(class, id))? {
                    session.destroy_object(object)?;
                }
            }
            Ok(())
        })?;
        match self.exists(id)? {
            true => Err(TokenError::Undestroyed { label: self.config.label.clone(), key: id }),
            false => Ok(()),
        }
    }

    /// Works with a session. One that does not stand any more is opened anew, once.
    fn with_session<T>(
        &self,
        action: &'static str,
        work: impl Fn(&Session) -> Result<T, Error>,
    ) -> Result<T, TokenError> {
        let mut connection = self.connection();
        let stood = connection.session.is_some();
        let error = match work(self.session(&mut connection)?) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        // What the token has lost, and what it has become, only a new start of the module shows.
        connection.session = None;
        if stood && is_session_lost(&error) {
            self.restart(&mut connection)?;
            return work(self.session(&mut connection)?).map_err(|error| {
                connection.session = None;
                self.failed(action, error)
            });
        }
        self.restart(&mut connection)?;
        Err(self.failed(action, error))
    }

    fn session<'a>(&self, connection: &'a mut Connection) -> Result<&'a Session, TokenError> {
        if connection.session.is_none() {
            let session = self.open(connection)?;
            connection.session = Some(session);
        }
        // It was put there a line above.
        connection.session.as_ref().ok_or_else(|| self.failed("open", Error::NotSupported))
    }

    fn open(&self, connection: &mut Connection) -> Result<Session, TokenError> {
        let (pin, version) = self.pin()?;
        let module = match &connection.module {
            Some(module) => module.clone(),
            None => {
                let module = self.load()?;
                connection.module.insert(module).clone()
            }
        };
        let slot = self.slot(&module).inspect_err(|_| {
            // A token that is plugged in later is seen by a module that starts anew.
            let _ = self.restart(connection);
        })?;
        let failed = |error| self.failed("open a session", error);
        let refuse = |reason: &str| TokenError::Pin {
            label: self.config.label.clone(),
            slot: slot.id(),
            file: self.config.pin_file.clone(),
            reason: reason.to_owned(),
        };
        if connection.refused == Some(version) {
            return Err(refuse("it was refused before"));
        }
        let info = module.get_token_info(slot).map_err(failed)?;
        if info.user_pin_locked() {
            return Err(refuse("the token is locked; unlock it with the SO PIN"));
        }
        if info.user_pin_final_try() {
            return Err(refuse(
                "one try is left; log in by hand once, which brings the others back",
            ));
        }
        let session = module.open_rw_session(slot).map_err(failed)?;
        match session.login(UserType::User, Some(&pin)) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(session),
            Err(Error::Pkcs11(
                error @ (RvError::PinIncorrect
                | RvError::PinInvalid
                | RvError::PinLenRange
                | RvError::PinExpired
                | RvError::PinLocked),
                _,
            )) => {
                connection.refused = Some(version);
                Err(refuse(&error.to_string()))
            }
            Err(error) => Err(self.failed("log in", error)),
        }
    }

    fn load(&self) -> Result<Pkcs11, TokenError> {
        let module = &self.config.module;
        let failed = |source| TokenError::Module { module: module.clone(), source };
        let loaded = Pkcs11::new(module).map_err(failed)?;
        initialize(&loaded).map_err(failed)?;
        tracing::info!(module = %module.display(), "PKCS#11 module loaded");
        Ok(loaded)
    }

    /// Ends and begins the use of the module: it looks for its tokens only then.
    fn restart(&self, connection: &mut Connection) -> Result<(), TokenError> {
        connection.session = None;
        let Some(module) = &connection.module else { return Ok(()) };
        // It may have ended by itself.
        let _ = module.clone().finalize();
        initialize(module).map_err(|error| self.failed("be started again", error))
    }

    fn slot(&self, module: &Pkcs11) -> Result<Slot, TokenError> {
        let failed = |error| self.failed("be looked for", error);
        let (mut found, mut there) = (Vec::new(), Vec::new());
        for slot in module.get_slots_with_initialized_token().map_err(failed)? {
            // One that is pulled out at this moment is not there.
            let Ok(info) = module.get_token_info(slot) else { continue };
            there.push(format!("{:?} in slot {slot}", info.label()));
            if info.label() == self.config.label {
                found.push(slot);
            }
        }
        match found.as_slice() {
            [slot] => Ok(*slot),
            _ => Err(TokenError::NoToken {
                label: self.config.label.clone(),
                module: self.config.module.clone(),
                found: found.len(),
                there: if there.is_empty() { "none".to_owned() } else { there.join(", ") },
            }),
        }
    }

    /// The PIN, read each time that it is needed.
    fn pin(&self) -> Result<(AuthPin, FileVersion), TokenError> {
        let file = &self.config.pin_file;
        let refuse = |reason: String| TokenError::PinFile { file: file.clone(), reason };
        let unreadable = |error: std::io::Error| refuse(format!("it cannot be read: {error}"));
        let mut open = File::open(file).map_err(unreadable)?;
        let metadata = open.metadata().map_err(unreadable)?;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            let path = file.display();
            return Err(refuse(format!(
                "it has mode {mode:04o}, so others than its owner could have read the PIN: \
                 `chmod 600 {path}`, and change the PIN if others have accounts here"
            )));
        }
        if metadata.len() > PIN_BYTES_MAX {
            return Err(refuse(format!("it has more than {PIN_BYTES_MAX} bytes, which is no PIN")));
        }
        let mut text = Zeroizing::new(String::with_capacity(PIN_BYTES_MAX as usize + 1));
        open.read_to_string(&mut text).map_err(unreadable)?;
        let pin = text.trim_end_matches(['\n', '\r']);
        if pin.is_empty() {
            return Err(refuse("it is empty: it must hold the user's PIN alone".to_owned()));
        }
        let version = (metadata.mtime(), metadata.mtime_nsec(), metadata.ino());
        Ok((AuthPin::new(pin.into()), version))
    }

    /// An uncompressed point, which tokens wrap in an OCTET STRING of 65 bytes, or, the older ones,
    /// do not.
    fn point(&self, attributes: &[Attribute], key: &str) -> Result<Vec<u8>, TokenError> {
        let bytes = match attributes {
            [Attribute::EcPoint(bytes)] => bytes.as_slice(),
            _ => &[],
        };
        match bytes {
            [4, 65, point @ ..] | point if point.len() == 65 && point[0] == 4 => Ok(point.to_vec()),
            _ => Err(self.no_point(key)),
        }
    }

    fn no_point(&self, key: &str) -> TokenError {
        TokenError::Public { label: self.config.label.clone(), key: key.to_owned() }
    }

    fn missing(&self, key: KeyId) -> TokenError {
        TokenError::Missing { label: self.config.label.clone(), key }
    }

    fn failed(&self, action: &'static str, source: Error) -> TokenError {
        let TokenConfig { label, module, .. } = self.config.clone();
        TokenError::Token { label, module, action, source }
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic in between leaves at worst a session that does not stand, which is opened anew.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn initialize(module: &Pkcs11) -> Result<(), Error> {
    match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
        initialized => initialized,
    }
}

/// Whether a new session may do better: the old one has ended, or the token was away.
fn is_session_lost(error: &Error) -> bool {
    use RvError::{
        CryptokiNotInitialized, DeviceError, DeviceRemoved, GeneralError, ObjectHandleInvalid,
        SessionClosed, SessionHandleInvalid, TokenNotPresent, TokenNotRecognized, UserNotLoggedIn,
    };
    matches!(
        error,
        Error::Pkcs11(
            CryptokiNotInitialized
                | DeviceError
                | DeviceRemoved
                | GeneralError
                | ObjectHandleInvalid
                | SessionClosed
                | SessionHandleInvalid
                | TokenNotPresent
                | TokenNotRecognized
                | UserNotLoggedIn,
            _
        )
    )
}

fn by_id(class: ObjectClass, id: KeyId) -> [Attribute; 2] {
    [Attribute::Class(class), Attribute::Id(id.as_bytes().to_vec())]
}

/// Both numbers of an ECDSA signature, one after the other, as ASN.1 has them: SEQUENCE of two
/// INTEGERs, each as short as it can be and never negative (X.690, 8.3).
fn asn1_signature(numbers: &[u8]) -> Option<Vec<u8>> {
    if numbers.len() != 64 {
        return None;
    }
    let integer = |number: &[u8]| {
        let zeroes = number.iter().take_while(|&&byte| byte == 0).count().min(number.len() - 1);
        let number = &number[zeroes..];
        let sign = if number[0] & 0x80 == 0 { &[][..] } else { &[0][..] };
        // 33 bytes at most: every length fits one byte.
        [&[0x02, (sign.len() + number.len()) as u8], sign, number].concat()
    };
    let both = [integer(&numbers[..32]), integer(&numbers[32..])].concat();
    Some([&[0x30, both.len() as u8], both.as_slice()].concat())
}

fn device(error: TokenError) -> KeyStoreError {
    KeyStoreError::Device(error.to_string())
}

/// What the labels of our keys begin with; the id follows.
const LABEL_PREFIX: &str = "steadfast-anchor-";
/// Of a key that has no id yet: one that a crash has left like this can be destroyed.
const NEW_LABEL: &str = "steadfast-anchor-new";
/// The curve, as CKA_EC_PARAMS has it: the object identifier 1.2.840.10045.3.1.7 in DER.
const P256_OID: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// What stands before the point in a SPKI on P-256 (RFC 5480, 2).
const P256_SPKI: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const PIN_BYTES_MAX: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_signature_are_as_short_as_can_be_and_never_negative() {
        let mut numbers = [0; 64];
        (numbers[31], numbers[32]) = (1, 0x80);
        let long = [&[0x02, 33, 0, 0x80][..], &[0; 31]].concat();
        let expected = [&[0x30, 38, 0x02, 1, 1], long.as_slice()].concat();
        assert_eq!(asn1_signature(&numbers), Some(expected));
        assert_eq!(asn1_signature(&[0; 64]), Some(vec![0x30, 6, 0x02, 1, 0, 0x02, 1, 0]));
        assert_eq!(asn1_signature(&[0; 63]), None);
    }

    #[test]
    fn a_place_is_a_uri_whatever_the_token_is_called() {
        let token = Token::new(TokenConfig {
            module: PathBuf::new(),
            label: "our ü/1".to_owned(),
            pin_file: PathBuf::new(),
        });
        let id = KeyId::of_spki(b"a key");
        let expected = format!("pkcs11:token=our%20%C3%BC%2F1;object=steadfast-anchor-{id}");
        assert_eq!(token.place_of(id), expected);
    }

    #[tokio::test]
    async fn a_pin_that_others_could_read_is_refused_before_any_module_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let pin_file = dir.path().join("pin");
        std::fs::write(&pin_file, "1234\n").unwrap();
        let config = TokenConfig { module: "/no/such.so".into(), label: "t".to_owned(), pin_file };
        let check = async || Token::new(config.clone()).check().await.unwrap_err().to_string();
        let error = check().await;
        assert!(error.contains("mode 0644") && error.contains("chmod 600"), "{error}");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&config.pin_file, mode).unwrap();
        let error = check().await;
        assert!(error.contains("--pkcs11-module /no/such.so"), "{error}");
        std::fs::write(&config.pin_file, "\n").unwrap();
        assert!(check().await.contains("is empty"));
    }
}
