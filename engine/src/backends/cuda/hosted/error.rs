//! libcuda's result codes as [`DriverError`]s, with CUDA's own names and texts.

use std::ffi::{CStr, c_char};
use std::format;
use std::string::String;

use gpu_kernels::driver::DriverError;

use super::ffi;

/// Errors after which the context does nothing more: faults of kernels and of the hardware.
const LOST: [u32; 15] = [4, 46, 214, 220, 221, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718];
/// `CUDA_ERROR_LAUNCH_FAILED`, of the same kind.
const LAUNCH_FAILED: u32 = 719;

/// The result of a call.
pub(super) fn check(op: &'static str, code: u32) -> Result<(), DriverError> {
    match code {
        ffi::SUCCESS => Ok(()),
        ffi::ERROR_NOT_SUPPORTED => Err(DriverError::Unsupported { op }),
        code if ffi::ERRORS_OF_CAPTURE.contains(&code) => Err(DriverError::Capture { op }),
        code if code == LAUNCH_FAILED || LOST.contains(&code) => {
            Err(DriverError::Lost { op, code, what: describe(code) })
        }
        code => Err(DriverError::Driver { op, code, what: describe(code) }),
    }
}

/// The result of a launch: what is wrong with the launch itself is told apart.
pub(super) fn check_launch(entry: &'static str, code: u32) -> Result<(), DriverError> {
    match code {
        ffi::ERROR_INVALID_VALUE
        | ffi::ERROR_LAUNCH_OUT_OF_RESOURCES
        | ffi::ERROR_COOPERATIVE_LAUNCH_TOO_LARGE => Err(DriverError::Launch { entry, what: describe(code) }),
        code => check("launch", code),
    }
}

/// CUDA's name and text of a code: `CUDA_ERROR_INVALID_VALUE: invalid argument`.
pub(super) fn describe(code: u32) -> String {
    let ask = |function: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
        let mut text = std::ptr::null();
        // SAFETY: the place for the result is valid. The driver's texts are static C strings; it leaves the place alone
        // or writes null for a code that it does not know, and so does our stub without a driver.
        unsafe {
            let known = function(code, &mut text) == ffi::SUCCESS && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (ask(ffi::cuGetErrorName), ask(ffi::cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{name}: {text}"),
        (Some(text), None) | (None, Some(text)) => text,
        (None, None) => format!("CUDA error {code}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_the_errors_callers_tell_apart() {
        assert_eq!(check("op", 0), Ok(()));
        assert!(matches!(check("op", 700), Err(DriverError::Lost { op: "op", code: 700, .. })));
        assert!(matches!(check("op", 719), Err(DriverError::Lost { .. })));
        assert_eq!(check("op", 801), Err(DriverError::Unsupported { op: "op" }));
        assert_eq!(check("op", 900), Err(DriverError::Capture { op: "op" }));
        assert!(matches!(check("op", 400), Err(DriverError::Driver { code: 400, .. })));
        assert!(matches!(check_launch("k", 1), Err(DriverError::Launch { entry: "k", .. })));
        assert!(matches!(check_launch("k", 719), Err(DriverError::Lost { op: "launch", .. })));
    }

    #[test]
    fn a_code_that_nobody_can_name_is_still_told() {
        let text = describe(123_456);
        assert!(text.contains("123456") || text.contains("CUDA_ERROR"), "{text}");
    }
}
